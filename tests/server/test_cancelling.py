"""A thousand calls that are given up at random moments leave nothing behind: no sample, no task, no file."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest

from server.engine import Sampled
from tests.fakes import FakeEngine
from tests.giving_up import GIVEN_UP, STRATEGIES, fill_pools, give_up, open_files, running_tasks
from tests.publishing import FakeSpeaker, Publisher
from tests.serving import running, until
from thumbloop.config import State, Verdict
from thumbloop.rendering import verdict_tokens
from thumbloop.v1 import policy_pb2

CALLS = 1_000
AT_ONCE = 25
LONGEST_S = 0.06
"""Most calls are given up within this time, and take longer where as many run."""


class UnhurriedEngine(FakeEngine):
    """Takes a moment for whatever it does, now and then for ever; knows what of it is under way."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.under_way = 0
        self.cut = 0
        self.gets_stuck = False
        self._rng = Random(1)

    async def sample(self, *arguments: Any, **more: Any) -> Sampled:
        with self._under_way():
            await asyncio.sleep(self._pause_s(0.005))
            return await super().sample(*arguments, **more)

    async def next_logprobs(self, *arguments: Any, **more: Any) -> tuple[float, ...]:
        with self._under_way():
            await asyncio.sleep(0.005)
            return await super().next_logprobs(*arguments, **more)

    async def stream(self, *arguments: Any, **more: Any) -> AsyncGenerator[Sampled, None]:
        with self._under_way():
            pause_s = self._pause_s(0.002)
            async with aclosing(super().stream(*arguments, **more)) as pieces:
                async for piece in pieces:
                    await asyncio.sleep(pause_s)
                    yield piece

    def _pause_s(self, ordinary_s: float) -> float:
        return 10.0 if self.gets_stuck and self._rng.random() < 0.2 else ordinary_s

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        self.under_way += 1
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.cut += 1
            raise
        finally:
            self.under_way -= 1


def request_of(rng: Random) -> policy_pb2.GenerateRequest:
    return policy_pb2.GenerateRequest(
        text="hello",
        guidance=policy_pb2.GuidanceParams(strategy=rng.choice(STRATEGIES)),
        request_id=rng.choice(["", "", "", "one"]),
        user_id=str(rng.randrange(300)),
        priority=rng.choice([policy_pb2.PRIORITY_INTERACTIVE, policy_pb2.PRIORITY_BACKGROUND]),
    )


async def test_a_thousand_calls_that_are_given_up_leave_nothing(
    tiny_model: Path, state: State, caplog: pytest.LogCaptureFixture
):
    limits = {"max_candidates_in_flight": 64, "max_queued_candidates": 1000}
    async with running(
        tiny_model, state, make_engine=lambda model, _config: UnhurriedEngine(model), limits=limits
    ) as server:
        engine, queue = server.engine, server.application._admission
        verdict = verdict_tokens(Verdict(), engine.tokenizer)
        speaker = FakeSpeaker(engine)
        Publisher(tiny_model, state.versions, server.database, verdict, speaker).publish(1)
        await server.serves(1)
        await fill_pools(server, AT_ONCE)
        tasks, files = running_tasks(), open_files()
        engine.gets_stuck = True
        rng, numbers = Random(0), iter(range(CALLS))
        ends: Counter[grpc.StatusCode] = Counter()

        async def caller() -> None:
            for _ in numbers:
                ends[await give_up(server, request_of(rng), LONGEST_S, rng)] += 1

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
        await until(lambda: engine.started == engine.finished + engine.aborted, 1)
        await until(lambda: not engine.under_way + engine.streaming, 1)
        assert not any(engine._in_use.values())
        await until(lambda: running_tasks() <= tasks, 1)
        await until(lambda: open_files() <= files, 5)
        assert (queue.candidates, queue.tokens, queue.queued) == (0, 0, 0)
        assert server.application._lifecycle.in_flight == 0
        given_up = ends[grpc.StatusCode.CANCELLED] + ends[grpc.StatusCode.DEADLINE_EXCEEDED]
        assert ends.keys() <= GIVEN_UP | {grpc.StatusCode.OK, grpc.StatusCode.ALREADY_EXISTS}
        assert given_up > 0.6 * CALLS
        assert engine.cut > 0.005 * CALLS  # on a slow machine most calls end before they sample
        assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []
