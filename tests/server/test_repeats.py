"""Requests that come twice: one reply for each request id of a user, over every call, also after a restart."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from sqlalchemy import Engine as Database

from server.repeats import Repeats, digest_of
from tests.refusals import detail_of, refused
from tests.rows import ANN, BOB, interaction
from tests.serving import Running, running, until
from thumbloop.config import State
from thumbloop.config.server import Limits
from thumbloop.errors import EngineUnavailable, RequestIdTaken
from thumbloop.store import interactions, reading
from thumbloop.types import DEFAULT_POLICY, Interaction, Status
from thumbloop.v1 import feedback_pb2, policy_pb2


def request(text: str = "hello", /, **changes: Any) -> policy_pb2.GenerateRequest:
    values = {"text": text, "user_id": "ann", "request_id": "q1"} | changes
    return policy_pb2.GenerateRequest(**values)


async def streamed(
    server: Running, message: policy_pb2.GenerateRequest
) -> tuple[str, policy_pb2.GenerateResponse]:
    """Return the text that came in pieces, and the whole reply."""
    stream = server.policy.StreamGenerate(policy_pb2.StreamGenerateRequest(request=message))
    *deltas, last = [event async for event in stream]
    return "".join(event.text_delta for event in deltas), last.response


def rows(server: Running) -> list[Interaction]:
    assert server.database is not None
    with reading(server.database) as connection:
        return interactions.list_since(connection, DEFAULT_POLICY, 0)


def test_a_digest_is_that_of_everything_but_the_id():
    assert digest_of(request()) == digest_of(request(request_id="another"))
    changes: list[dict[str, Any]] = [
        {"user_id": "bob"},
        {"session_id": "s"},
        {"include_candidates": True},
        {"sampling": {"seed": 0}},
        {"priority": policy_pb2.PRIORITY_BACKGROUND},
        {"policy_version": 0},
    ]
    digests = {digest_of(request(**change)) for change in changes}
    assert len(digests | {digest_of(request()), digest_of(request("hullo"))}) == len(changes) + 2


def test_taking_a_digest_changes_nothing():
    message = request()
    digest_of(message)
    assert message == request()


async def test_a_retry_gets_the_stored_reply_and_samples_nothing(server: Running):
    first = await server.policy.Generate(request(include_candidates=True))
    started = server.engine.started
    for _ in range(3):
        assert await server.policy.Generate(request(include_candidates=True)) == first
    assert server.engine.started == started
    assert len(rows(server)) == 1


async def test_a_retry_after_a_restart_gets_the_stored_reply(tiny_model: Path, state: State):
    async with running(tiny_model, state) as server:
        first = await server.policy.Generate(request())
    async with running(tiny_model, state) as server:
        assert await server.policy.Generate(request()) == first
        assert server.engine.started == 0
        assert await streamed(server, request()) == (first.text, first)
        other = await refused(server.policy.Generate(request("another")))
        assert other.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_one_that_comes_while_the_first_runs_waits_for_its_reply(server: Running):
    server.engine.may_sample.clear()
    calls = [server.policy.Generate(request()) for _ in range(5)]
    streams = [asyncio.create_task(streamed(server, request())) for _ in range(5)]
    await server.sampling(4)
    await until(lambda: server.application._lifecycle.in_flight == 10)
    server.engine.may_sample.set()
    replies = await asyncio.gather(*calls)
    heard = await asyncio.gather(*streams)
    assert {reply.response_id for reply in replies} == {replies[0].response_id}
    assert heard == [(replies[0].text, replies[0])] * 5
    assert server.engine.started == 4
    assert len(rows(server)) == 1


async def test_so_many_wait_for_one_reply_and_no_more(tiny_model: Path, state: State):
    async with running(tiny_model, state, limits={"max_waiting_repeats": 2}) as server:
        server.engine.may_sample.clear()
        calls = [server.policy.Generate(request()) for _ in range(3)]
        await until(lambda: server.application._lifecycle.in_flight == 3)
        error = await refused(server.policy.Generate(request()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert detail_of(error, error_details_pb2.RetryInfo).retry_delay.ToSeconds() == 1
        server.engine.may_sample.set()
        assert len({(await call).response_id for call in calls}) == 1


async def test_a_repeat_counts_as_one_candidate(tiny_model: Path, state: State):
    async with running(tiny_model, state, quotas={"per_user": "7/minute"}) as server:
        first = await server.policy.Generate(request())  # of four candidates
        for _ in range(3):
            assert await server.policy.Generate(request()) == first
        error = await refused(server.policy.Generate(request()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("is_running", [True, False])
async def test_another_request_under_the_same_id_is_refused(server: Running, is_running: bool):
    first = server.policy.Generate(request())
    if is_running:
        server.engine.may_sample.clear()
        await server.sampling(4)
    else:
        await first
    for wrong in (request("another"), request(sampling={"seed": 1}), request(session_id="s")):
        for call in (server.policy.Generate(wrong), streamed(server, wrong)):
            error = await refused(call)
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS
            assert "request_id" in error.details()
    server.engine.may_sample.set()
    await first
    assert server.engine.started == 4
    assert len(rows(server)) == 1


async def test_the_same_id_of_another_user_is_another_request(server: Running):
    anns = await server.policy.Generate(request("hello"))
    bobs = await server.policy.Generate(request("something else", user_id="bob"))
    assert anns.response_id != bobs.response_id
    assert (await server.policy.Generate(request())).response_id == anns.response_id


async def test_requests_without_an_id_are_all_new(server: Running):
    replies = [await server.policy.Generate(request(request_id="")) for _ in range(3)]
    assert len({reply.response_id for reply in replies}) == 3


@pytest.mark.parametrize("is_stream", [True, False])
async def test_after_a_call_that_was_cancelled_a_retry_is_answered_anew(
    server: Running, is_stream: bool
):
    server.engine.may_sample.clear()
    if is_stream:
        given_up = server.policy.StreamGenerate(policy_pb2.StreamGenerateRequest(request=request()))
    else:
        given_up = server.policy.Generate(request())
    await server.sampling(4)
    given_up.cancel()
    await until(lambda: server.engine.aborted == 4)
    server.engine.may_sample.set()
    reply = await server.policy.Generate(request())
    assert reply.text
    assert await server.policy.Generate(request()) == reply
    statuses = [row.status for row in rows(server)]
    assert statuses == [Status.CANCELLED, Status.COMPLETED]


async def test_after_a_call_that_failed_a_retry_is_answered_anew(server: Running):
    server.engine.is_full = True
    error = await refused(server.policy.Generate(request()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    server.engine.is_full = False
    assert (await server.policy.Generate(request())).text


@pytest.mark.parametrize("how", ["cancel", "fail"])
async def test_who_waited_for_a_call_that_came_to_nothing_takes_its_place(
    server: Running, how: str
):
    sample = server.engine.sample

    async def fail_for_the_first(*arguments: Any, **more: Any) -> Any:
        is_first = server.engine.started < 4
        sampled = await sample(*arguments, **more)
        if is_first:
            raise EngineUnavailable("gave up on it")
        return sampled

    if how == "fail":
        server.engine.sample = fail_for_the_first
    server.engine.may_sample.clear()
    first = server.policy.Generate(request())
    await server.sampling(4)
    waiting = [server.policy.Generate(request()) for _ in range(3)]
    await until(lambda: server.application._lifecycle.in_flight == 4)
    if how == "cancel":
        first.cancel()
        await until(lambda: server.engine.aborted == 4)
    server.engine.may_sample.set()
    replies = await asyncio.gather(*waiting)
    assert len({reply.response_id for reply in replies}) == 1
    assert server.engine.started == 8
    assert len([row for row in rows(server) if row.status is Status.COMPLETED]) == 1
    if how == "fail":
        assert (await refused(first)).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_retry_of_a_call_that_was_cancelled_as_its_row_was_written_finds_the_row(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    append, entered, may_write = interactions.append, threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> None:
        entered.set()
        may_write.wait(10)
        append(*arguments)

    monkeypatch.setattr(interactions, "append", slowly)
    call = server.policy.Generate(request())
    await asyncio.to_thread(entered.wait, 10)
    retry = server.policy.Generate(request())
    await until(lambda: server.application._lifecycle.in_flight == 2)
    call.cancel()
    await asyncio.sleep(0.05)
    may_write.set()
    assert (await retry).text
    assert [row.status for row in rows(server)] == [Status.COMPLETED]
    assert server.engine.started == 4


async def test_a_waiter_that_gives_up_takes_nobody_with_it(server: Running):
    server.engine.may_sample.clear()
    first = server.policy.Generate(request())
    await server.sampling(4)
    waiting = server.policy.Generate(request())
    await until(lambda: server.application._lifecycle.in_flight == 2)
    waiting.cancel()
    await until(lambda: server.application._lifecycle.in_flight == 1)
    assert server.engine.aborted == 0
    server.engine.may_sample.set()
    assert await server.policy.Generate(request()) == await first


async def test_a_stream_and_a_call_are_the_same_request(server: Running):
    text, whole = await streamed(server, request())
    assert (text, whole.text) == (whole.text, text)
    assert await server.policy.Generate(request()) == whole
    assert await streamed(server, request()) == (text, whole)
    assert server.engine.started == 4


async def test_a_thumb_under_the_id_of_another_is_refused(server: Running):
    reply = await server.policy.Generate(request())
    values: dict[str, Any] = {
        "response_id": reply.response_id,
        "thumb": feedback_pb2.THUMB_UP,
        "user_id": "ann",
        "request_id": "t1",
    }
    first = await server.feedback.SubmitFeedback(feedback_pb2.SubmitFeedbackRequest(**values))
    again = await server.feedback.SubmitFeedback(feedback_pb2.SubmitFeedbackRequest(**values))
    assert (again.feedback_id, again.duplicate) == (first.feedback_id, True)
    for change in ({"thumb": feedback_pb2.THUMB_DOWN}, {"comment": "well"}):
        other = feedback_pb2.SubmitFeedbackRequest(**(values | change))
        error = await refused(server.feedback.SubmitFeedback(other))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_ids_that_are_done_with_are_forgotten(database: Database):
    repeats = Repeats(database, Limits())

    async def answer() -> Interaction:
        return interaction()

    await asyncio.gather(
        *(repeats.once(user, str(i), "d", answer) for user in (ANN, BOB) for i in range(20))
    )
    assert repeats._running == {}


async def test_a_row_without_a_digest_is_no_answer(database: Database):
    with database.begin() as connection:
        interactions.append(connection, interaction(request_id="q", request_digest=""))
    made = interaction(request_id="q")

    async def answer() -> Interaction:
        return made

    assert await Repeats(database, Limits()).once(ANN, "q", "d", answer) is made


async def test_two_servers_on_one_store_answer_an_id_once(tiny_model: Path, state: State):
    async with running(tiny_model, state) as one, running(tiny_model, state) as other:
        for server in (one, other):
            server.engine.may_sample.clear()
        calls = [server.policy.Generate(request()) for server in (one, other)]
        for server in (one, other):
            await server.sampling(4)
        one.engine.may_sample.set()
        first = await calls[0]
        other.engine.may_sample.set()
        error = await refused(calls[1])
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        assert "send it again" in error.details()
        assert await other.policy.Generate(request()) == first


def test_the_store_refuses_a_second_reply_to_one_request(database: Database):
    reply = interaction(request_id="q", request_digest="d" * 64)
    with database.begin() as connection:
        interactions.append(connection, reply)
    with pytest.raises(RequestIdTaken), database.begin() as connection:
        interactions.append(connection, interaction(request_id="q", request_digest="e" * 64))
    with database.begin() as connection:
        interactions.append(connection, interaction(request_id="q", request_digest="", user=BOB))
        assert interactions.find(connection, ANN, "q") == reply
        assert interactions.find(connection, BOB, "q") is None
