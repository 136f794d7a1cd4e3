"""Time is up: the engine stops at once, the row says why, and nothing learns from it."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.refusals import refused
from tests.serving import Running, running, until
from thumbloop.config import State
from thumbloop.config.trainer import Round
from thumbloop.store import interactions, reading
from thumbloop.types import DEFAULT_POLICY, Status
from thumbloop.v1 import policy_pb2
from trainer import dataset

HELLO = policy_pb2.GenerateRequest(text="hello")


@pytest.mark.parametrize(
    ("limits", "timeout_s"),
    [
        ({"default_timeout_s": 0.2}, None),
        ({"max_timeout_s": 0.2}, None),
        ({"max_timeout_s": 0.2}, 30.0),
        ({}, 0.2),
    ],
    ids=["default", "cap of the default", "cap of the caller's", "the caller's own"],
)
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_call_that_takes_too_long_is_aborted_and_its_row_says_so(
    tiny_model: Path,
    state: State,
    limits: dict[str, float],
    timeout_s: float | None,
    is_streamed: bool,
):
    async with running(tiny_model, state, limits=limits) as server:
        server.engine.may_sample.clear()
        started = time.monotonic()
        if is_streamed:
            request = policy_pb2.StreamGenerateRequest(request=HELLO)
            call = server.policy.StreamGenerate(request, timeout=timeout_s)
            error = await refused(call.read())
        else:
            error = await refused(server.policy.Generate(HELLO, timeout=timeout_s))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.1 < time.monotonic() - started < 10
        await until(lambda: server.engine.aborted == 4, timeout_s=1.0)
        await until(lambda: server.application._lifecycle.in_flight == 0)
        server.engine.may_sample.set()
        assert (await server.policy.Generate(HELLO, timeout=10)).text
        with reading(server.database) as connection:
            late, answered = interactions.list_since(connection, DEFAULT_POLICY, 0)
        assert (late.status, answered.status) == (Status.CANCELLED, Status.COMPLETED)
        assert (late.trainable, late.untrainable_reason) == (False, "cancelled")
        assert late.candidates == ()


async def test_a_call_that_waits_for_its_turn_leaves_the_queue_when_time_is_up(
    tiny_model: Path, state: State
):
    limits = {"max_candidates": 4, "max_candidates_in_flight": 4}
    async with running(tiny_model, state, limits=limits) as server:
        server.engine.may_sample.clear()
        first = asyncio.ensure_future(server.policy.Generate(HELLO))
        await server.sampling(4)
        error = await refused(server.policy.Generate(HELLO, timeout=0.2))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: server.application._admission.queued == 0)
        server.engine.may_sample.set()
        assert (await first).text
        assert server.engine.started == 4  # the one that waited cost the engine nothing


async def test_a_given_up_request_is_no_rollout(server: Running):
    server.engine.may_sample.clear()
    call = server.policy.Generate(HELLO)
    await server.sampling(4)
    call.cancel()
    await until(lambda: server.engine.aborted == 4)
    server.engine.may_sample.set()
    await server.policy.Generate(HELLO)
    with reading(server.database) as connection:
        given_up, _ = interactions.list_since(connection, DEFAULT_POLICY, 0)
    assert given_up.status is Status.CANCELLED
    assert dataset.interaction_left_out(given_up, Round()) == "cancelled"


async def test_the_time_that_a_call_waits_for_its_turn_is_part_of_its_time(
    tiny_model: Path, state: State
):
    """It is answered from what is ready before its deadline, however late its turn came."""
    limits = {"max_candidates": 4, "max_candidates_in_flight": 4}
    async with running(tiny_model, state, limits=limits) as server:
        engine, sample = server.engine, server.engine.sample

        async def one_is_slow(*arguments: Any, **more: Any) -> Any:
            if engine.started == 7:
                await asyncio.sleep(30)
            return await sample(*arguments, **more)

        engine.sample = one_is_slow
        engine.may_sample.clear()
        first = asyncio.ensure_future(server.policy.Generate(HELLO))
        await server.sampling(4)
        late = server.policy.Generate(HELLO, timeout=1.5)
        await until(lambda: server.application._admission.queued == 4)
        await asyncio.sleep(0.75)
        engine.may_sample.set()
        await first
        reply = await late
        assert reply.num_candidates == 3
        assert reply.candidate_extent == policy_pb2.CANDIDATE_EXTENT_DEADLINE


async def test_a_call_without_time_is_late_at_once(server: Running):
    for timeout_s in (1e-6, 0.001):
        error = await refused(server.policy.Generate(HELLO, timeout=timeout_s))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: server.application._lifecycle.in_flight == 0, 1)
