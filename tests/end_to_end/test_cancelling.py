"""Calls that are given up at random moments leave nothing behind in real vLLM, nor in the server."""

import asyncio
from collections import Counter
from pathlib import Path
from random import Random

import grpc
import pytest

from server.engine import Engine
from tests.serving import Running
from thumbloop.v1 import policy_pb2

pytestmark = pytest.mark.asyncio(loop_scope="session")

CALLS = 1_000
AT_ONCE = 24
LONGEST_S = 0.15
"""Most calls are given up within this time; a call takes longer where two dozen run."""
IDLE_WITHIN_S = 1.0
STRATEGIES = [
    policy_pb2.GUIDANCE_STRATEGY_NONE,
    policy_pb2.GUIDANCE_STRATEGY_BEST_OF_N,
    policy_pb2.GUIDANCE_STRATEGY_SOFT_BEST_OF_N,
    policy_pb2.GUIDANCE_STRATEGY_SPECULATIVE_REJECTION,
]
GIVEN_UP = {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}


def unfinished(engine: Engine) -> int:
    """Return how many requests vLLM has under way."""
    return engine._llm.output_processor.get_num_unfinished_requests()


def running_tasks() -> set[str]:
    """Return all tasks but those in which gRPC waits for its next call."""
    return {
        task.get_name()
        for task in asyncio.all_tasks()
        if "AioServer" not in task.get_coro().__qualname__
    }


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def give_up(server: Running, rng: Random) -> grpc.StatusCode:
    """Make a call, unary or streamed, and cancel it or let it expire; return how it ended."""
    request = policy_pb2.GenerateRequest(
        text="What did you think of the film?",
        sampling=policy_pb2.SamplingParams(max_tokens=128),
        guidance=policy_pb2.GuidanceParams(strategy=rng.choice(STRATEGIES), num_candidates=3),
    )
    patience_s = rng.uniform(0, LONGEST_S)
    expires = rng.random() < 0.5
    timeout_s = patience_s if expires else None
    call: grpc.aio.Call
    if rng.random() < 0.5:
        call = server.policy.Generate(request, timeout=timeout_s)
    else:
        streamed = policy_pb2.StreamGenerateRequest(request=request)
        call = server.policy.StreamGenerate(streamed, timeout=timeout_s)
    if not expires:
        await asyncio.sleep(patience_s)
        call.cancel()
    return await call.code()


async def test_a_thousand_calls_that_are_given_up_leave_nothing(server: Running):
    rng, numbers = Random(0), iter(range(CALLS))
    ends: Counter[grpc.StatusCode] = Counter()
    await asyncio.gather(*(server.generate("warm up") for _ in range(AT_ONCE)))
    await asyncio.gather(*(server.client.versions() for _ in range(AT_ONCE)))  # fills a pool
    before = running_tasks()
    files = open_files()

    async def caller() -> None:
        for _ in numbers:
            ends[await give_up(server, rng)] += 1

    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    await asyncio.sleep(IDLE_WITHIN_S)
    assert unfinished(server.engine) == 0
    assert server.application._lifecycle.in_flight == 0
    assert server.application._admission.candidates == 0
    assert ends.keys() <= GIVEN_UP | {grpc.StatusCode.OK}
    assert sum(ends[code] for code in GIVEN_UP) > 0.9 * CALLS
    assert running_tasks() - before == set()
    assert open_files() <= files
    assert (await server.generate("and on it goes")).text
