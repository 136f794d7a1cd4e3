"""kill -9 of server, engine and trainer at random moments while people ask and rate."""

import asyncio
import os
import signal
from pathlib import Path
from random import Random
from time import monotonic, sleep, time
from typing import Any

from loadtest.journal import OK, Entry, Journal, People
from loadtest.judge import read, verdict
from loadtest.midway import Midway
from loadtest.soak_swaps import settings_of
from thumbloop.client import AsyncClient
from thumbloop.config import State
from thumbloop.processes import Process

_USERS = 4
_MAX_TOKENS = 24
_PAUSE_S = 0.2
_SHARES = {"server": 0.25, "engine": 0.25, "trainer": 0.5}
_BETWEEN_S = (0.5, 6.0)
_SERVING_AGAIN_S = 180.0
_LOOK_S = 0.05
_ENGINE = "VLLM::EngineCor"  # the name of its process, as much of it as the kernel keeps
_TRAINER = {
    "round": {"first_feedback": 16, "min_feedback": 16, "min_rollouts": 16, "max_rollouts": 32},
    "gate": {"enabled": False},  # thumbs are drawn at random: nothing is to be learned
    "metrics": {"port": 0},
}


class NotServing(Exception):
    """After a kill nobody was answered for minutes; the message says after which."""


class Scene:
    """Server and trainer as processes on one store; what is killed is started again."""

    def __init__(self, found: Midway, folder: Path) -> None:
        self.state = State(folder=folder / "state")
        self._folder = folder
        self._server_settings = settings_of(found, self.state)
        self._server_settings["engine"]["max_restarts_per_hour"] = 100_000
        self._server_settings["sampling"] = {"max_tokens": _MAX_TOKENS}
        shared = {name: self._server_settings[name] for name in ("state", "model")}
        self._trainer_settings = _TRAINER | shared
        self.server: Process
        self.trainer: Process

    async def start(self) -> int:
        """Start both; return the port, which stays the same from now on."""
        self.server = self._make("server", self._server_settings)
        port, _ = await self.server.serving_ports()
        self._server_settings["listen"] = {"port": port}
        self.trainer = self._make("trainer", self._trainer_settings)
        return port

    def _make(self, name: str, settings: dict[str, Any]) -> Process:
        return Process.of_application(name, settings, self._folder)

    def kill(self, what: str) -> None:
        """Kill one process, nothing else, and start it again; nobody starts an engine but the server."""
        match what:
            case "server":
                os.kill(self.server.pid, signal.SIGKILL)
                self.server.stop()  # what is left of its session
                self.server = self._make("server", self._server_settings)
            case "engine":
                os.kill(_await_engine(self.server.pid), signal.SIGKILL)
            case "trainer":
                os.kill(self.trainer.pid, signal.SIGKILL)
                self.trainer.stop()
                self.trainer = self._make("trainer", self._trainer_settings)

    def stop(self) -> None:
        """Stop both."""
        for name in ("trainer", "server"):
            if (process := getattr(self, name, None)) is not None:
                process.stop()


def _await_engine(server: int) -> int:
    """Return the process that computes for a server; right after a reply it may be ending, and another come."""
    deadline = monotonic() + _SERVING_AGAIN_S
    while True:
        try:
            return engine_of(server)
        except LookupError:
            if monotonic() > deadline:
                raise NotServing(f"no engine for {_SERVING_AGAIN_S:g} s") from None
            sleep(_LOOK_S)


def engine_of(server: int) -> int:
    """Return the process that computes for a server."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                _, name, rest = _stat(folder)
            except OSError:
                continue  # it has ended meanwhile
            if name == _ENGINE and int(rest.split()[1]) == server:
                return int(folder.name)
    raise LookupError(f"process {server} has no engine")


def _stat(folder: Path) -> tuple[str, str, str]:
    before, _, after = (folder / "stat").read_text().partition("(")
    name, _, rest = after.rpartition(")")
    return before, name, rest


async def soak_kills(found: Midway, folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Kill, and go on once people are answered again; return what is to be reported."""
    scene, journal, rng = Scene(found, folder), Journal(folder / "journal.jsonl"), Random(seed)
    counts = dict.fromkeys(_SHARES, 0)
    away: dict[str, list[float]] = {name: [] for name in _SHARES}
    not_serving = ""
    try:
        port = await scene.start()
        async with AsyncClient(f"127.0.0.1:{port}", timeout_s=30.0) as client:
            people = People(
                client,
                journal,
                found.texts[:50],
                max_tokens=_MAX_TOKENS,
                greedy_share=0.5,
                rates=True,
                seed=seed,
            )
            async with people.present(_USERS, _PAUSE_S):
                await _served(journal, time(), "the start")
                for _ in range(kills):
                    await asyncio.sleep(rng.uniform(*_BETWEEN_S))
                    what = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
                    await asyncio.to_thread(scene.kill, what)
                    journal.happened("kill", what=what)
                    counts[what] += 1
                    away[what].append(await _served(journal, time(), f"a kill of the {what}"))
    except NotServing as error:  # what was written down until then is judged all the same
        not_serving = str(error)
    finally:
        scene.stop()
        journal.close()
    stored = read(scene.state)
    return verdict(journal.entries, stored, {}) | {
        "kills": counts,
        "not_serving": not_serving,
        "serving_again_s": {name: max(times, default=0.0) for name, times in away.items()},
        "versions_published": len(stored.parents) - 1,
    }


async def _served(journal: Journal, since: float, after: str) -> float:
    """Wait until somebody asked after that moment and was answered; return how long it took.

    Raises NotServing.
    """
    while time() < since + _SERVING_AGAIN_S:
        if any(_is_answer(entry, since) for entry in journal.entries[-100:]):
            return time() - since
        await asyncio.sleep(_LOOK_S)
    raise NotServing(f"nobody was answered for {_SERVING_AGAIN_S:g} s after {after}")


def _is_answer(entry: Entry, since: float) -> bool:
    return entry.kind == "generate" and entry.status == OK and entry.began >= since
