"""What every measurement of `make bench` has: the policy, our server, and turns that alternate."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from loadtest.bare import BareEngine
from loadtest.midway import Midway
from loadtest.ours import PLAIN, Thumbloop, guided
from loadtest.peers import VllmServer
from loadtest.swapping import Swapping
from loadtest.workload import Answer, Ask, Throughput, closed_loop
from thumbloop.client import AsyncClient
from thumbloop.config import State
from thumbloop.processes import Process
from thumbloop.types import Strategy

MAX_TOKENS = 64
_WARM_UP_CALLS = 64
_SETTLE_S = 1.5

T = TypeVar("T")


class CallsFailed(Exception):
    """A measurement without all of its answers is none."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a measurement is given."""

    found: Midway
    dtype: str
    repeats: int
    folder: Path
    packages: Path

    def prompts(self, numbers: Iterable[int]) -> list[tuple[int, ...]]:
        """Return the prompts of these questions, token ids."""
        known = self.found.prompts
        return [known[number % len(known)] for number in numbers]

    def bare(self, name: str, *flags: str) -> Awaitable[BareEngine]:
        """Start a bare engine."""
        given = ("--model", str(self.found.model), "--dtype", self.dtype)
        return BareEngine.start(name, self.folder, (*given, *flags))

    def vllm(self, name: str, *flags: str, model: Path | None = None) -> VllmServer:
        """Start one of vLLM's HTTP servers."""
        return VllmServer(name, model or self.found.model, self.dtype, self.folder, flags)


class Ours:
    """Our server with the policy that is half way as its current version."""

    def __init__(self, setting: Setting, client: AsyncClient, state: State) -> None:
        self.state = state
        self._target = Thumbloop(client, setting.found.texts)

    def asking(self, strategy: Strategy, num_candidates: int) -> Ask:
        """Ask with a strategy."""
        options = PLAIN if strategy is Strategy.NONE else guided(strategy, num_candidates)
        return partial(self._target.ask, options=options)

    def asking_greedily(self) -> Ask:
        """Ask for one candidate at temperature 0."""
        return partial(self._target.ask, options=replace(PLAIN, temperature=0.0))


@asynccontextmanager
async def ours(setting: Setting, **guidance: Any) -> AsyncIterator[Ours]:
    """Start our server on a blank store, and publish the version to it as a trainer would.

    `guidance` are settings of that section.
    """
    state = State(folder=setting.folder / "state")
    if state.folder.exists():
        shutil.rmtree(state.folder)
    settings = {
        "state": {"folder": str(state.folder)},
        "model": {"path": str(setting.found.model)},
        "listen": {"port": 0},
        "http": {"enabled": False},
        "metrics": {"port": 0},
        # 8 requests of 10 candidates at once, and scores: none is to be cut for lack of room.
        "engine": {"dtype": setting.dtype, "kv_cache_gib": 1.0, "max_num_seqs": 128},
        "sampling": {"max_tokens": MAX_TOKENS},
        "guidance": guidance,
    }
    process = Process.of_application("server", settings, setting.folder)
    try:
        port, _ = await process.serving_ports()
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            with Swapping(state) as swapping:
                await swapping.to(setting.found.version)
            yield Ours(setting, client, state)
    finally:
        process.stop()


async def in_turn(
    setting: Setting, turns: Mapping[str, Callable[[range], Awaitable[T]]], size: int
) -> dict[str, list[T]]:
    """Let each turn ask the questions of each repeat; returns what came of them, repeat by repeat.

    A short first round warms up and is forgotten. The order is turned round from one repeat to the
    next, so that a machine that grows slower favours nobody. Before each turn all is quiet for a
    while: stock vLLM's processes spin for a second after their last work.
    """
    results: dict[str, list[T]] = {name: [] for name in turns}
    for repeat in range(-1, setting.repeats):
        first = max(repeat, 0) * size
        numbers = range(first, first + (size if repeat >= 0 else min(size, _WARM_UP_CALLS)))
        for name in list(turns)[:: -1 if repeat % 2 else 1]:
            await asyncio.sleep(_SETTLE_S)
            result = await turns[name](numbers)
            if repeat >= 0:
                results[name].append(result)
    return results


def calling(ask: Ask, at_once: int) -> Callable[[range], Awaitable[Throughput]]:
    """Return the turn that asks a server. Raises CallsFailed: it refused some."""

    async def turn(numbers: range) -> Throughput:
        run = await closed_loop(ask, numbers, at_once)
        if run.failed:
            raise CallsFailed(f"{run.failed} of {len(numbers)} calls failed; see the logs")
        return run

    return turn


def answers(runs: Sequence[Throughput]) -> list[Answer]:
    """Return all answers of all repeats, in the order of their questions."""
    return [answer for run in runs for answer in run.answers]


async def started(stack: AsyncExitStack, starting: Awaitable[BareEngine]) -> BareEngine:
    """Start an engine that the stack stops."""
    engine = await starting
    stack.push_async_callback(engine.stop)
    return engine


def serving(stack: AsyncExitStack, server: VllmServer) -> VllmServer:
    """Let the stack stop a server."""
    stack.callback(server.stop)
    return server
