"""Calls that are given up at random moments leave nothing behind in real vLLM, nor in the server."""

import asyncio
from collections import Counter
from random import Random

import grpc
import pytest

from server.engine import Engine
from tests.giving_up import GIVEN_UP, STRATEGIES, fill_pools, give_up, open_files, running_tasks
from tests.serving import Running
from thumbloop.v1 import policy_pb2

pytestmark = pytest.mark.asyncio(loop_scope="session")

CALLS = 1_000
AT_ONCE = 24
LONGEST_S = 0.15
"""Most calls are given up within this time; a call takes longer where two dozen run."""
IDLE_WITHIN_S = 1.0


def unfinished(engine: Engine) -> int:
    """Return how many requests vLLM has under way."""
    return engine._llm.output_processor.get_num_unfinished_requests()


def request_of(rng: Random) -> policy_pb2.GenerateRequest:
    return policy_pb2.GenerateRequest(
        text="What did you think of the film?",
        sampling=policy_pb2.SamplingParams(max_tokens=128),
        guidance=policy_pb2.GuidanceParams(strategy=rng.choice(STRATEGIES), num_candidates=3),
    )


async def test_a_thousand_calls_that_are_given_up_leave_nothing(server: Running):
    rng, numbers = Random(0), iter(range(CALLS))
    ends: Counter[grpc.StatusCode] = Counter()
    await fill_pools(server, AT_ONCE)
    before = running_tasks()
    files = open_files()

    async def caller() -> None:
        for _ in numbers:
            ends[await give_up(server, request_of(rng), LONGEST_S, rng)] += 1

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
