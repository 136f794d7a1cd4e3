"""Backup and restore as docs/deploy.md has them, beside a server that answers; folders are the volumes."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dockerfile import ROOT
from tests.publishing import Publisher
from tests.serving import running
from thumbloop.config import State

GUIDE = (ROOT / "docs/deploy.md").read_text()
_EXEC = re.compile(r"kubectl -n thumbloop exec (?:-i )?\S+ -- (.*)")


def commands_of(section: str, volumes: dict[str, Path]) -> list[list[str]]:
    """Return what each block of a section runs inside pods, with folders in the place of volumes."""
    text = GUIDE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [[_in_folders(command, volumes) for command in _EXEC.findall(b)] for b in blocks]


def _in_folders(command: str, volumes: dict[str, Path]) -> str:
    return re.sub(r"(?<![\w.-])/(state|tmp)\b", lambda found: str(volumes[found[0]]), command)


def run(commands: list[str], folder: Path) -> None:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    for command in commands:
        shell = ["bash", "-euo", "pipefail", "-c", command]
        subprocess.run(shell, cwd=folder, env=environment, check=True)


@pytest.fixture
def volumes(state: State, tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "temporary").mkdir()
    return {"/state": state.folder, "/tmp": tmp_path / "temporary"}


async def test_a_copy_taken_while_people_are_served_is_whole(
    tiny_model: Path,
    state: State,
    publisher: Publisher,
    volumes: dict[str, Path],
    tmp_path: Path,
):
    backup, restore = commands_of("Backup and restore", volumes)
    assert (len(backup), len(restore)) == (3, 2)
    publisher.publish(1)
    async with running(tiny_model, state) as server:
        await server.serves(1)
        kept = await server.generate("hello", user_id="ann")
        copying = asyncio.create_task(asyncio.to_thread(run, backup, tmp_path))
        while not copying.done():
            await server.generate("busy", user_id="bob")
        await copying
        late = await server.generate("hello", user_id="ann")
        log = (state.folder / "thumbloop.db-wal").read_bytes()
    (state.folder / "thumbloop.db-wal").write_bytes(log)  # as a server that was killed leaves it
    await asyncio.to_thread(run, restore, tmp_path)
    async with running(tiny_model, state) as server:
        await server.serves(1)
        assert server.stored(kept.response_id).chosen.text == kept.text
        again = await server.client.rate(kept.response_id, up=True, user_id="ann")
        assert again.feedback_id == 1
        with pytest.raises(AssertionError):
            server.stored(late.response_id)
