"""Serving while a trainer works on the same cores, over serving without it."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import uvloop

from loadtest import figures
from loadtest.figures import Figure
from loadtest.setting import Setting, calling, in_turn, ours
from loadtest.work import Work
from loadtest.workload import Throughput
from thumbloop.processes import Process
from thumbloop.types import Strategy

_CALLS, _AT_ONCE = 240, 16
_CANDIDATES = 4
_ALONE_S = 20.0
RESTED_SHARE = 0.25
"""The trainer's `resources.max_share` where it rests: of two cores serving may lose half of that."""


class Shared(NamedTuple):
    """What calls did in one turn, and how many optimizer steps a second the trainer took meanwhile."""

    throughput: Throughput | None
    steps_per_s: float


class BusyTrainer:
    """Updates without end in a process of its own, that stands still between turns."""

    def __init__(self, name: str, job: Path, folder: Path, max_share: float) -> None:
        """Start it; `job` is what it learns from."""
        share = ["--max-share", str(max_share)]
        command = [sys.executable, "-m", "experiments.busy", str(job), *share]
        threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = Process(name, command, folder, environment=threads)

    async def ready(self) -> None:
        """Wait until it works, then let it stand still."""
        await self._process.says(r"step")
        os.kill(self._process.pid, signal.SIGSTOP)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Let it work until the block ends."""
        os.kill(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            self._process.check()
            os.kill(self._process.pid, signal.SIGSTOP)

    def steps(self) -> int:
        """Return how many optimizer steps it has taken."""
        return self._process.log.read_text().count("step\n")

    def stop(self) -> None:
        """End it."""
        with suppress(ProcessLookupError):  # it may have failed, which is said already
            os.kill(self._process.pid, signal.SIGCONT)
        self._process.stop()


def beside(work: Work) -> dict[str, Figure]:
    """Throughput of the default strategy beside a busy trainer over that without one."""
    found: dict[str, Figure] = uvloop.run(_beside(work))
    return found


async def _beside(work: Work) -> dict[str, Figure]:
    setting = Setting(work.found, "float32", work.repeats, work.folder, work.shared / "packages")
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(ours(setting))
        job = work.freeze()
        trainers = {
            name: BusyTrainer(name, job, work.folder, share)
            for name, share in (("busy", 1.0), ("rested", RESTED_SHARE))
        }
        for trainer in trainers.values():
            stack.callback(trainer.stop)
        for trainer in trainers.values():
            await trainer.ready()
        turn = calling(server.asking(Strategy.SOFT_BEST_OF_N, _CANDIDATES), _AT_ONCE)

        async def without(numbers: range) -> Shared:
            return Shared(await turn(numbers), 0.0)

        async def together(trainer: BusyTrainer, numbers: range) -> Shared:
            before, started = trainer.steps(), perf_counter()
            async with trainer.working():
                throughput = await turn(numbers)
            return Shared(throughput, (trainer.steps() - before) / (perf_counter() - started))

        async def alone(_numbers: range) -> Shared:
            trainer = trainers["busy"]
            before, started = trainer.steps(), perf_counter()
            async with trainer.working():
                await asyncio.sleep(_ALONE_S)
            return Shared(None, (trainer.steps() - before) / (perf_counter() - started))

        turns: dict[str, Callable[[range], Awaitable[Shared]]] = {
            "without": without,
            "together": partial(together, trainers["busy"]),
            "rested": partial(together, trainers["rested"]),
            "alone": alone,
        }
        return describe_sharing(await in_turn(setting, turns, _CALLS))


def describe_sharing(runs: Mapping[str, Sequence[Shared]]) -> dict[str, Figure]:
    """Return what server and trainer keep of their speed beside each other, repeat by repeat."""
    rates = {
        name: [run.throughput.tokens_per_s for run in runs[name] if run.throughput is not None]
        for name in ("without", "together", "rested")
    }
    steps = {
        name: [run.steps_per_s for run in runs[name]] for name in ("together", "rested", "alone")
    }
    return {
        "beside.serving_ratio": figures.ratio(rates["together"], rates["without"]),
        "beside.training_ratio": figures.ratio(steps["together"], steps["alone"]),
        "beside.rested_serving_ratio": figures.ratio(rates["rested"], rates["without"]),
        "beside.rested_training_ratio": figures.ratio(steps["rested"], steps["alone"]),
        "beside.tokens_per_s": figures.of_repeats(rates["together"]),
        "beside.steps_per_s": figures.of_repeats(steps["together"]),
    }
