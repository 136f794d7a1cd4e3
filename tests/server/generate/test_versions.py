"""A request stays on the version that it began with, whatever is published meanwhile."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc

from server.engine import Adapter
from server.engine.protocol import PROBE_PRIORITY
from tests.fakes import FakeEngine
from tests.publishing import publisher_of
from tests.refusals import refused
from tests.serving import Running, running, until
from thumbloop.config import State
from thumbloop.v1 import policy_pb2


async def test_a_pinned_request_is_answered_by_that_version(taught: Running):
    for number in (0, 1):
        reply = await taught.generate("hello", policy_version=number)
        assert reply.policy_version == number
        assert taught.stored(reply.response_id).policy_version == number
    unknown = await refused(taught.generate("hello", policy_version=7))
    assert unknown.code() is grpc.StatusCode.NOT_FOUND
    assert "available: 0, 1" in unknown.details()


async def test_a_pin_to_a_version_that_was_unloaded_is_a_failed_precondition(
    tiny_model: Path, state: State
):
    async with running(tiny_model, state, engine={"max_versions": 3}) as server:
        publisher = publisher_of(server, tiny_model, state)
        publisher.publish(1)
        await server.serves(1)
        await until(lambda: len(server.engine.loaded) == 2)
        error = await refused(server.generate("hello", policy_version=0))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "not loaded; available: 1" in error.details()


async def test_a_swap_in_the_middle_leaves_a_request_on_the_version_it_began_with(
    tiny_model: Path, state: State
):
    async with running(tiny_model, state) as server:
        publisher = publisher_of(server, tiny_model, state)
        server.engine.may_sample.clear()
        call = asyncio.create_task(server.generate("hello"))
        await server.sampling(4)
        publisher.publish(1)
        await server.sampling(5)  # a probe waits too
        server.engine.may_sample.set()
        assert (await call).policy_version == 0
        await server.serves(1)
        assert (await server.generate("hello")).policy_version == 1


class Raters:
    """Rewards of replies that are one number; the next one may be held back. Probes are the engine's own."""

    def __init__(self, engine: FakeEngine) -> None:
        self.reward = 1.0
        self.by: list[str] = []
        self.is_asked, self.may_answer = asyncio.Event(), asyncio.Event()
        self.may_answer.set()
        self._engines = engine.next_logprobs
        engine.next_logprobs = self._answer  # type: ignore[method-assign]

    async def _answer(
        self, prompt: Sequence[int], tokens: Sequence[int], adapter: Adapter, *, priority: int
    ) -> tuple[float, ...]:
        numbers = await self._engines(prompt, tokens, adapter, priority=priority)
        if priority == PROBE_PRIORITY:
            return numbers
        self.by.append(adapter.name)
        reward = self.reward
        self.is_asked.set()
        await self.may_answer.wait()
        return reward, 0.0


async def test_a_swap_between_two_waves_leaves_both_and_their_scores_on_the_version_they_began_with(
    tiny_model: Path, state: State
):
    guidance = {"first_wave": 2, "min_audits": 2, "audit_share": 0.5}
    async with running(tiny_model, state, guidance=guidance) as server:
        publisher, raters = publisher_of(server, tiny_model, state), Raters(server.engine)
        row = publisher.publish(1)
        await server.serves(1)
        for seed in range(100):  # until audits have said what is good
            sampling = policy_pb2.SamplingParams(seed=seed)
            reply = await server.generate("hello", sampling=sampling)
            if reply.candidate_extent == policy_pb2.CANDIDATE_EXTENT_ENOUGH:
                break
        sampled, raters.reward = server.engine.sampled_under, -1.0
        for seen in (sampled, raters.by, raters.is_asked, raters.may_answer):
            seen.clear()
        call = asyncio.create_task(server.generate("hello", sampling=sampling))
        await raters.is_asked.wait()
        assert dict(sampled) == {"default-000001-policy": 2}
        publisher.publish(2, 1)
        await server.serves(2)
        raters.may_answer.set()
        reply = await call
        stored = server.stored(reply.response_id)
    assert sampled["default-000001-policy"] == 4
    assert raters.by == ["default-000001-reward"] * 4
    assert (reply.policy_version, reply.num_candidates) == (1, 4)
    assert {(c.policy_version, c.reward) for c in stored.candidates} == {(1, -1.0)}
    assert (stored.policy_digest, stored.reward_digest) == (row.policy_digest, row.reward_digest)
