"""kill -9 of server, engine and trainer at random moments while people ask and rate.

In the first half versions become current at once, in the second they are tried on half of the people, and an operator
promotes them or takes the current one back, about when something is killed. Some kills come while the server still
recovers from the one before.
"""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from random import Random
from time import monotonic, sleep, time
from typing import Any

from loadtest.journal import OK, Entry, Journal, People
from loadtest.judge import answers, read, trials, verdict
from loadtest.midway import Midway
from loadtest.soak_swaps import settings_of
from thumbloop.client import AsyncClient
from thumbloop.config import State
from thumbloop.errors import ThumbloopError
from thumbloop.processes import Process, ProcessFailed
from thumbloop.types import BASE_VERSION
from thumbloop.v1 import admin_pb2

_USERS = 6
_MAX_TOKENS = 24
_PAUSE_S = 0.2
_KILLED = ("server", "engine", "trainer")
_BETWEEN_S = (0.5, 6.0)
_AT_ONCE_S = (0.0, 6.0)
_AGAIN_SHARE, _OPERATOR_SHARE, _PROMOTES_SHARE = 0.25, 0.7, 0.7
_TRYING = {"mode": "canary", "canary": {"share": 0.5, "max_time_s": 120.0}}
_SERVING_AGAIN_S = 180.0
_LOOK_S = 0.05
_ENGINE = "VLLM::EngineCor"  # the name of its process, as much of it as the kernel keeps
_TRAINER = {
    "round": {
        "first_feedback": 16,
        "min_feedback": 16,
        "max_user_feedback": 8,  # what piles up while trainers are killed must not make rounds longer than they live
        "max_older_feedback": 64,
        "min_rollouts": 16,
        "max_rollouts": 32,
    },
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
        self.restarted = 0
        """Times that a server ended whose engine was killed: whatever runs it starts it again."""
        self.crashed: list[str] = []
        """Last words of what ended by itself otherwise."""
        self._has_lost_its_engine: set[int] = set()
        self._is_over = False

    async def start(self) -> int:
        """Start both; return the port, which stays the same from now on."""
        self.server = self._make("server", self._server_settings)
        port, _ = await self.server.serving_ports()
        self._server_settings["listen"] = {"port": port}
        self.trainer = self._make("trainer", self._trainer_settings)
        return port

    def _make(self, name: str, settings: dict[str, Any]) -> Process:
        if self._is_over:  # for a thread that goes on after Ctrl-C
            raise NotServing("it is over")
        return Process.of_application(name, settings, self._folder)

    def begin_trials(self) -> None:
        """From the next start of the server on versions are tried."""
        self._server_settings["delivery"] = _TRYING

    def kill(self, what: str) -> None:
        """Kill one process, nothing else, and start it again; nobody starts an engine but the server."""
        match what:
            case "server":
                os.kill(self.server.pid, signal.SIGKILL)
                self._start_server_again()
            case "engine":
                self._kill_engine()
            case "trainer":
                os.kill(self.trainer.pid, signal.SIGKILL)
                self._start_trainer_again()

    def tend(self) -> None:
        """Start what ended by itself, as a server does whose engine is killed while it starts."""
        try:
            self.server.check()
        except ProcessFailed as error:
            if self.server.pid in self._has_lost_its_engine:
                self.restarted += 1
            else:
                self.crashed.append(str(error))
            self._start_server_again()
        try:
            self.trainer.check()
        except ProcessFailed as error:
            self.crashed.append(str(error))
            self._start_trainer_again()

    def _start_server_again(self) -> None:
        self.server.stop()  # what is left of its session
        self.server = self._make("server", self._server_settings)

    def _start_trainer_again(self) -> None:
        self.trainer.stop()
        self.trainer = self._make("trainer", self._trainer_settings)

    def _kill_engine(self) -> None:
        """Kill what computes for the server, once there is one: it may be ending, and another come."""
        deadline = monotonic() + _SERVING_AGAIN_S
        while monotonic() < deadline:
            self.tend()
            with suppress(LookupError, ProcessLookupError):
                os.kill(engine_of(self.server.pid), signal.SIGKILL)
                self._has_lost_its_engine.add(self.server.pid)
                return
            sleep(_LOOK_S)
        raise NotServing(f"no engine for {_SERVING_AGAIN_S:g} s")

    def stop(self) -> None:
        """Stop both, for good."""
        self._is_over = True
        for name in ("trainer", "server"):
            if (process := getattr(self, name, None)) is not None:
                process.stop()


def engine_of(server: int) -> int:
    """Return the process that computes for a server."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                _, name, rest = _stat(folder)
            except OSError:
                continue  # it has ended meanwhile
            state, parent = rest.split()[:2]
            if name == _ENGINE and int(parent) == server and state != "Z":
                return int(folder.name)
    raise LookupError(f"process {server} has no engine")


def _stat(folder: Path) -> tuple[str, str, str]:
    before, _, after = (folder / "stat").read_text().partition("(")
    name, _, rest = after.rpartition(")")
    return before, name, rest


async def soak_kills(found: Midway, folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Kill, and go on once people are answered again; return what is to be reported."""
    scene, journal = Scene(found, folder), Journal(folder / "journal.jsonl")
    killer, operator = _Killer(scene, journal, Random(seed)), Random(f"{seed}:operator")
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
                await _served(scene, journal, "the start")
                while killer.done < kills:
                    if not killer.is_trying and killer.done >= kills // 2:
                        await killer.begin_trials()
                    await asyncio.gather(killer.kill(), _operate(client, journal, operator))
    except NotServing as error:  # what was written down until then is judged all the same
        not_serving = str(error)
    finally:
        scene.stop()
        journal.close()
    stored = read(scene.state)
    moves = [e for e in journal.entries if e.kind in ("promote", "rollback") and e.status == OK]
    return verdict(journal.entries, stored, {}) | {
        "kills": killer.counts,
        "kills_while_recovering": killer.again,
        "restarted": scene.restarted,
        "crashed": scene.crashed,
        "not_serving": not_serving,
        "serving_again_s": {name: max(times, default=0.0) for name, times in killer.away_s.items()},
        "versions_published": len(stored.parents) - 1,
        "trials": len(trials(stored)),
        "operators_moves": len(moves),
    }


class _Killer:
    """Kills one of three, by lot, and sometimes another before the first is back."""

    def __init__(self, scene: Scene, journal: Journal, rng: Random) -> None:
        self._scene = scene
        self._journal = journal
        self._rng = rng
        self.counts = dict.fromkeys(_KILLED, 0)
        self.away_s: dict[str, list[float]] = {name: [] for name in _KILLED}
        self.again = 0
        self.is_trying = False

    @property
    def done(self) -> int:
        return sum(self.counts.values())

    async def begin_trials(self) -> None:
        """Have versions tried from now on, for which the server has to start anew: it is killed."""
        self.is_trying = True
        self._scene.begin_trials()
        await self._kill("server")
        await _served(self._scene, self._journal, "the beginning of trials")

    async def kill(self) -> None:
        """Wait a while, kill, and wait until people are answered again. Raises NotServing."""
        await asyncio.sleep(self._rng.uniform(*_BETWEEN_S))
        what, since = await self._kill(self._drawn()), time()
        if self._rng.random() < _AGAIN_SHARE:
            await asyncio.sleep(self._rng.uniform(*_AT_ONCE_S))
            self.again += not _is_answered(self._journal, since)
            await self._kill(self._drawn())
            await _served(self._scene, self._journal, "a second kill")
        else:
            took = await _served(self._scene, self._journal, f"a kill of the {what}")
            self.away_s[what].append(took)

    def _drawn(self) -> str:
        return self._rng.choices(_KILLED)[0]

    async def _kill(self, what: str) -> str:
        await asyncio.to_thread(self._scene.kill, what)
        self._journal.happened("kill", what=what)
        self.counts[what] += 1
        return what


async def _operate(client: AsyncClient, journal: Journal, rng: Random) -> None:
    """Promote what is on trial, or take the current version back, as an operator does; or do nothing."""
    if rng.random() > _OPERATOR_SHARE:
        return
    await asyncio.sleep(rng.uniform(*_BETWEEN_S))
    kind, number, status, began = "", 0, OK, time()
    try:
        listed = await client.versions()
        current, canary = listed.current_version, admin_pb2.POLICY_VERSION_STATE_CANARY
        tried = [v.policy_version for v in listed.policy_versions if v.state == canary]
        if tried and rng.random() < _PROMOTES_SHARE:
            kind, number = "promote", tried[0]
            await client.promote(number, expected_current=current)
        elif tried and current != BASE_VERSION:
            kind, number = "rollback", current
            await client.roll_back(expected_current=number)
    except ThumbloopError as error:
        status = error.code.name
    if kind:
        journal.note(Entry(kind, began, time(), status, None, {"version": number}))


async def _served(scene: Scene, journal: Journal, after: str) -> float:
    """Wait until somebody asked from now on and was answered; return how long it took. Raises NotServing."""
    since = time()
    while time() < since + _SERVING_AGAIN_S:
        if _is_answered(journal, since):
            return time() - since
        scene.tend()
        await asyncio.sleep(_LOOK_S)
    raise NotServing(f"nobody was answered for {_SERVING_AGAIN_S:g} s after {after}")


def _is_answered(journal: Journal, since: float) -> bool:
    return any(entry.began >= since for entry in answers(journal.entries[-100:]))
