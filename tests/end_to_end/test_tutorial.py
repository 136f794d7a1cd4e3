"""The tutorial with the processes that it starts: vLLM serves over TLS to who has the token, the trainer waits."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.blocks import MODEL, ROOT, Shell, blocks, commands, environment

READY = {"serve": "serving on port", "train": "waiting for"}
_START_S = 240


def free_port() -> str:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


@contextmanager
def started(command: str, shell: Shell) -> Iterator[None]:
    """Run one of the page's commands that do not end, until the block does; it has to be ready before."""
    _, target, config = command.split()
    name = config.removeprefix("CONFIG=")
    log = shell.folder / f"{target}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["make", target, f"CONFIG={shell.folder / name}"],
            cwd=ROOT,
            env=shell.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        last = time.monotonic() + _START_S
        while READY[target] not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < last, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        process.terminate()  # make tells what it runs
        process.wait(60)


def a_shell(folder: Path, model: Path) -> Shell:
    """Return a reader's shell on ports of its own, whose settings name files of its folder by whole paths."""
    port, http = free_port(), free_port()
    ports = {
        "THUMBLOOP_SERVER_LISTEN__PORT": port,
        "THUMBLOOP_SERVER_HTTP__PORT": http,
        "THUMBLOOP_SERVER_METRICS__PORT": free_port(),
        "THUMBLOOP_TRAINER_METRICS__PORT": free_port(),
    }
    given = environment(THUMBLOOP_ADDRESS=f"localhost:{port}", **ports)
    meant = {
        MODEL: str(model),
        "folder: state-mine": f"folder: {folder / 'state-mine'}",
        "cert.pem": str(folder / "cert.pem"),
        "key.pem": str(folder / "key.pem"),
        ":50051": f":{port}",
        ":8080": f":{http}",
    }
    return Shell(folder, given, meant)


@pytest.mark.timeout(600)
async def test_what_the_tutorial_starts_answers_and_waits_for_thumbs(
    tiny_model: Path, tmp_path: Path
):
    shell = a_shell(tmp_path, tiny_model)
    outputs: list[str] = []
    with ExitStack() as processes:
        for block in blocks("docs/tutorial.md"):
            if block.language == "yaml":
                (tmp_path / block.file).write_text(shell.said(block.text))
            elif block.serves:
                for command in commands(block):
                    processes.enter_context(started(command, shell))
            else:
                outputs.append(await shell.run(block))
            if "import" in block.text and "thumbs.jsonl" in block.text:
                break  # the rest is about a version that was learned
    assert "imported 2," in outputs[-1]
    assert "waiting for 80 new thumbs" in (tmp_path / "train.log").read_text()
