"""kill -9 of a server process under load, again and again: what was acknowledged is there, once."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import yaml

from loadtest.journal import OK, Journal, People
from loadtest.judge import read, verdict
from tests.serving import config_of
from thumbloop.client import AsyncClient
from thumbloop.config import State
from thumbloop.processes import Process

KILLS = 7
SERVER = """
import sys
import uvloop
from pathlib import Path
from server.__main__ import serve
from tests.fakes import FakeEngine
import server.__main__ as command
from thumbloop.config import ServerConfig, load
command.make_engine = lambda model, config: FakeEngine(model)
uvloop.run(serve(load(ServerConfig, Path(sys.argv[1]))))
"""


def start(settings: Path, folder: Path) -> Process:
    return Process("server", [sys.executable, "-c", SERVER, str(settings)], folder)


async def test_what_was_acknowledged_survives_every_kill(tiny_model: Path, tmp_path: Path):
    state = State(folder=tmp_path / "state")
    settings, config = tmp_path / "server.yaml", config_of(tiny_model, state)
    settings.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process, journal = start(settings, tmp_path), Journal(tmp_path / "journal.jsonl")
    leaving = asyncio.Event()
    try:
        port, _ = await process.serving_ports()
        fixed = config.model_copy(
            update={"listen": config.listen.model_copy(update={"port": port})}
        )
        settings.write_text(yaml.safe_dump(fixed.model_dump(mode="json")))
        async with AsyncClient(f"127.0.0.1:{port}", timeout_s=10) as client:
            people = People(
                client, journal, ["a b", "c d"], max_tokens=8, greedy_share=0.5, rates=True, seed=0
            )
            users = [asyncio.create_task(people.use(n, leaving)) for n in range(4)]
            for kill in range(KILLS):
                await _rated(journal)
                await asyncio.sleep(0.01 * kill)
                os.kill(process.pid, signal.SIGKILL)
                process.stop()
                process = start(settings, tmp_path)
            await process.serving_ports()
            await _rated(journal)
            leaving.set()
            await asyncio.gather(*users)
    finally:
        leaving.set()
        process.stop()
        journal.close()
    found = verdict(journal.entries, read(state), {})
    assert found["wrong"] == {}
    assert found["calls"]["rate OK"] >= KILLS
    assert set(found["calls"]) <= {
        "generate OK",
        "rate OK",
        "generate UNAVAILABLE",
        "rate UNAVAILABLE",
    }


async def _rated(journal: Journal) -> None:
    """Wait until a thumb that is given from now on is acknowledged."""
    before = len(journal.entries)
    async with asyncio.timeout(60):
        while not any(  # noqa: ASYNC110
            e.kind == "rate" and e.status == OK for e in journal.entries[before:]
        ):
            await asyncio.sleep(0.01)
