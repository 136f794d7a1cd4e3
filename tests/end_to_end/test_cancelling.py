"""Calls that are given up at random moments leave nothing behind in real vLLM, nor in the server."""

import asyncio
from collections import Counter
from random import Random
from typing import Any

import grpc
import pytest

from server.engine import Engine
from tests.giving_up import GIVEN_UP, STRATEGIES, fill_pools, give_up, open_files, running_tasks
from tests.publishing import Publisher
from tests.serving import Running
from thumbloop.v1 import policy_pb2

pytestmark = pytest.mark.asyncio(loop_scope="session")

CALLS = 1_000
AT_ONCE = 24
LONGEST_S = 0.15
"""Most calls are given up within this time; a call takes longer where two dozen run."""
IDLE_WITHIN_S = 1.0
SPECULATIVE_REJECTION = policy_pb2.GUIDANCE_STRATEGY_SPECULATIVE_REJECTION


def unfinished(engine: Engine) -> int:
    """Return how many requests vLLM waits for on our side; one that is given up it forgets at once."""
    return engine._llm.output_processor.get_num_unfinished_requests()


async def is_busy(engine: Engine) -> bool:
    """Ask vLLM's core, a process of its own, whether its scheduler has requests."""
    return await engine._llm.engine_core.call_utility_async("has_work")


def list_cut_scores(engine: Any) -> list[asyncio.CancelledError]:
    """Return a list that will grow with each score that is given up with its call."""
    score, cut = engine.next_logprobs, []

    async def listed(*arguments: Any, **more: Any) -> tuple[float, ...]:
        try:
            return await score(*arguments, **more)
        except asyncio.CancelledError as error:
            cut.append(error)
            raise

    engine.next_logprobs = listed
    return cut


def request_of(strategy: int, max_tokens: int) -> policy_pb2.GenerateRequest:
    return policy_pb2.GenerateRequest(
        text="What did you think of the film?",
        sampling=policy_pb2.SamplingParams(max_tokens=max_tokens),
        guidance=policy_pb2.GuidanceParams(strategy=strategy, num_candidates=3),
    )


async def test_a_thousand_calls_that_are_given_up_leave_nothing(
    server: Running, publisher: Publisher
):
    await asyncio.to_thread(publisher.publish, 1)
    await server.serves(1)  # version 0 has no rewards, and nothing is pruned without
    rng, numbers = Random(0), iter(range(CALLS))
    ends: Counter[grpc.StatusCode] = Counter()
    await fill_pools(server, AT_ONCE)
    before = running_tasks()
    files = open_files()
    cut = list_cut_scores(server.engine)

    async def caller() -> None:
        for _ in numbers:
            request = request_of(rng.choice(STRATEGIES), rng.choice((16, 128)))
            ends[await give_up(server, request, LONGEST_S, rng)] += 1

    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    await asyncio.sleep(IDLE_WITHIN_S)
    assert not await is_busy(server.engine)
    assert unfinished(server.engine) == 0
    assert server.application._lifecycle.in_flight == 0
    assert server.application._admission.candidates == 0
    assert ends.keys() <= GIVEN_UP | {grpc.StatusCode.OK}
    assert sum(ends[code] for code in GIVEN_UP) > 0.9 * CALLS
    assert running_tasks() - before == set()
    assert open_files() <= files
    assert cut
    raced = await server.policy.Generate(request_of(SPECULATIVE_REJECTION, 128))
    assert any(c.stage_rewards for c in server.stored(raced.response_id).candidates)
