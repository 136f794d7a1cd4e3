"""Requests that are refused, given up, or come to nothing: callers hear why, and nothing is left behind."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from server.engine import BACKGROUND_PRIORITY, REPLY_PRIORITY
from tests.fakes import FakeEngine
from tests.refusals import detail_of, fields, refused
from tests.serving import Running, running, until
from thumbloop.config import State
from thumbloop.store import interactions, reading
from thumbloop.types import (
    DEFAULT_POLICY,
    Status,
)
from thumbloop.v1 import policy_pb2

NAN, INF = float("nan"), float("inf")


def rows(server: Running) -> int:
    assert server.database is not None
    with reading(server.database) as connection:
        return len(interactions.list_since(connection, DEFAULT_POLICY, 0))


BAD_REQUESTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no prompt": ({}, ["prompt"]),
    "an empty text": ({"text": ""}, ["text"]),
    "a blank text": ({"text": " \n\t"}, ["text"]),
    "an empty conversation": ({"chat": {}}, ["chat.messages"]),
    "a turn without a role": (
        {"chat": {"messages": [{"content": "hi"}]}},
        ["chat.messages[0].role"],
    ),
    "a turn without words": (
        {"chat": {"messages": [{"role": "ROLE_USER", "content": " "}]}},
        ["chat.messages[0].content"],
    ),
    "a system turn without words": (
        {"chat": {"messages": [{"role": "ROLE_SYSTEM"}, {"role": "ROLE_USER", "content": "hi"}]}},
        ["chat.messages[0].content"],
    ),
    "an assistant's last turn": (
        {"chat": {"messages": [{"role": "ROLE_ASSISTANT", "content": "hi"}]}},
        ["chat.messages[0].role"],
    ),
    "too many characters": ({"text": "x" * 200_001}, ["text"]),
    "too many tokens": ({"text": "x y " * 400}, ["prompt"]),
    "no room for the reply": ({"text": "hi", "sampling": {"max_tokens": 1000}}, ["prompt"]),
    "no candidates": (
        {"text": "hi", "guidance": {"num_candidates": 0}},
        ["guidance.num_candidates"],
    ),
    "too many candidates": (
        {"text": "hi", "guidance": {"num_candidates": 17}},
        ["guidance.num_candidates"],
    ),
    "guidance temperature 0": (
        {"text": "hi", "guidance": {"temperature": 0}},
        ["guidance.temperature"],
    ),
    "guidance temperature NaN": (
        {"text": "hi", "guidance": {"temperature": NAN}},
        ["guidance.temperature"],
    ),
    "a strategy by a name that is not served": (
        {"text": "hi", "guidance": {"strategy_name": "worst_of_n"}},
        ["guidance.strategy_name"],
    ),
    "a strategy named twice": (
        {
            "text": "hi",
            "guidance": {
                "strategy_name": "best_of_n",
                "strategy": "GUIDANCE_STRATEGY_BEST_OF_N",
            },
        },
        ["guidance.strategy"],
    ),
    "a strategy by a long name": (
        {"text": "hi", "guidance": {"strategy_name": "n" * 33}},
        ["guidance.strategy_name", "guidance.strategy_name"],
    ),
    "an unknown strategy": ({"text": "hi", "guidance": {"strategy": 99}}, ["guidance.strategy"]),
    "no tokens": ({"text": "hi", "sampling": {"max_tokens": 0}}, ["sampling.max_tokens"]),
    "too many tokens asked": (
        {"text": "hi", "sampling": {"max_tokens": 2**32 - 1}},
        ["sampling.max_tokens"],
    ),
    "temperature NaN": ({"text": "hi", "sampling": {"temperature": NAN}}, ["sampling.temperature"]),
    "temperature infinite": (
        {"text": "hi", "sampling": {"temperature": INF}},
        ["sampling.temperature"],
    ),
    "temperature below 0": (
        {"text": "hi", "sampling": {"temperature": -1}},
        ["sampling.temperature"],
    ),
    "temperature above 2": (
        {"text": "hi", "sampling": {"temperature": 2.01}},
        ["sampling.temperature"],
    ),
    "temperature nearly 0": (
        {"text": "hi", "sampling": {"temperature": 1e-5}},
        ["sampling.temperature"],
    ),
    "top_p NaN": ({"text": "hi", "sampling": {"top_p": NAN}}, ["sampling.top_p"]),
    "top_p 0": ({"text": "hi", "sampling": {"top_p": 0}}, ["sampling.top_p"]),
    "top_p above 1": ({"text": "hi", "sampling": {"top_p": 1.5}}, ["sampling.top_p"]),
    "top_k beyond all": ({"text": "hi", "sampling": {"top_k": 2_000_000}}, ["sampling.top_k"]),
    "too many stops": ({"text": "hi", "sampling": {"stop": ["a"] * 9}}, ["sampling.stop"]),
    "an empty stop": ({"text": "hi", "sampling": {"stop": ["a", ""]}}, ["sampling.stop[1]"]),
    "a long stop": ({"text": "hi", "sampling": {"stop": ["a" * 129]}}, ["sampling.stop[0]"]),
    "a long user id": ({"text": "hi", "user_id": "u" * 257}, ["user_id"]),
    "a long session id": ({"text": "hi", "session_id": "u" * 257}, ["session_id"]),
    "a long request id": ({"text": "hi", "request_id": "u" * 129}, ["request_id"]),
    "unknown learning": ({"text": "hi", "learning": 9}, ["learning"]),
    "a version below 0": ({"text": "hi", "policy_version": -1}, ["policy_version"]),
    "several at once": (
        {
            "text": "",
            "user_id": "u" * 300,
            "sampling": {"temperature": NAN, "top_p": 7},
            "guidance": {"num_candidates": 0},
        },
        [
            "text",
            "sampling.temperature",
            "sampling.top_p",
            "guidance.num_candidates",
            "user_id",
        ],
    ),
}


async def test_whatever_is_wrong_with_a_request_is_named_field_by_field(server: Running):
    wrong = {}
    for name, (request, expected) in BAD_REQUESTS.items():
        error = await refused(server.policy.Generate(policy_pb2.GenerateRequest(**request)))
        found = fields(error)
        if found != expected:
            wrong[name] = found
    assert wrong == {}
    assert server.engine.started == 0
    assert rows(server) == 0


async def test_the_longest_prompt_that_fits_is_answered(server: Running):
    room = server.engine.max_model_len - 16 - 2  # the reply, the question, the verdict
    longest = "ab" * (room // 2)
    ids = len(server.engine.tokenizer.encode(longest))
    longest += "z" * (room - ids)
    assert len(server.engine.tokenizer.encode(longest)) == room
    assert (await server.generate(longest)).usage.prompt_tokens == room
    assert fields(await refused(server.generate(longest + "z"))) == ["prompt"]


async def test_a_message_beyond_the_limit_is_refused_by_grpc_itself(tiny_model: Path, state: State):
    """In its own words and without RetryInfo: a retry would not help."""
    async with running(tiny_model, state, listen={"max_message_bytes": 20_000}) as server:
        empty = policy_pb2.GenerateRequest(text="hi", user_id="x" * 1000).ByteSize() - 1000
        longest = "x" * (20_000 - empty - 1)  # its length takes a byte more to say
        assert policy_pb2.GenerateRequest(text="hi", user_id=longest).ByteSize() == 20_000
        assert fields(await refused(server.generate("hi", user_id=longest))) == ["user_id"]
        error = await refused(server.generate("hi", user_id=longest + "x"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max (20001 vs. 20000)" in (error.details() or "")
        assert rpc_status.from_call(error) is None


async def test_another_policy_is_not_found(server: Running):
    assert (await server.generate("hello", policy="default")).text
    error = await refused(server.generate("hello", policy="another"))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_too_many_calls_at_once_are_told_when_to_come_again(tiny_model: Path, state: State):
    async with running(tiny_model, state, limits={"max_requests_in_flight": 2}) as server:
        server.engine.may_sample.clear()
        inside = [asyncio.create_task(server.generate("hello")) for _ in range(2)]
        await server.sampling(8)
        error = await refused(server.generate("one too many"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        delay = detail_of(error, error_details_pb2.RetryInfo).retry_delay
        assert delay.ToMilliseconds() == 500
        server.engine.may_sample.set()
        await asyncio.gather(*inside)
        assert (await server.generate("again")).text


async def test_a_full_engine_queue_says_so(server: Running):
    server.engine.is_full = True
    error = await refused(server.generate("hello"))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail_of(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 250
    assert rows(server) == 0


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_call_that_is_given_up_stops_its_samples_and_its_row_says_so(
    server: Running, how: str
):
    server.engine.may_sample.clear()
    request = policy_pb2.GenerateRequest(text="hello")
    call = server.policy.Generate(request, timeout=0.5 if how == "deadline" else None)
    await server.sampling(4)
    if how == "cancel":
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    else:
        assert (await refused(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: server.engine.aborted == 4)
    server.engine.may_sample.set()
    assert (await server.generate("next")).text
    assert rows(server) == 2
    with reading(server.database) as connection:
        given_up, _ = interactions.list_since(connection, DEFAULT_POLICY, 0)
    assert (given_up.status, given_up.untrainable_reason) == (Status.CANCELLED, "cancelled")
    assert not given_up.trainable
    assert given_up.candidates == ()


async def test_an_unexpected_error_is_internal_and_tells_nothing(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("the secret path /etc/passwd")

    monkeypatch.setattr(FakeEngine, "speak", fail)
    error = await refused(server.generate("hello"))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "internal error; the server's log has the cause"
    assert rpc_status.from_call(error) is None
    assert "the secret path" in caplog.text


async def test_a_reply_whose_row_cannot_be_written_is_not_given(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    from sqlalchemy.exc import OperationalError

    def fail(*_arguments: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("disk full"))

    monkeypatch.setattr(interactions, "append", fail)
    error = await refused(server.generate("hello"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "disk full" in error.details()


async def test_a_row_is_durable_before_the_reply_leaves(server: Running):
    replies = await asyncio.gather(*(server.generate(f"hello {i}") for i in range(20)))
    for reply in replies:
        assert server.stored(reply.response_id).chosen.text == reply.text


@pytest.mark.parametrize("strategy", ["none", "best_of_n", "speculative_rejection"])
async def test_what_nobody_waits_for_is_sampled_after_everything_else(
    taught: Running, monkeypatch: pytest.MonkeyPatch, strategy: str
):
    asked: set[int] = set()

    def spy_on(name: str) -> None:
        call = getattr(FakeEngine, name)

        def spy(engine: FakeEngine, *arguments: Any, priority: int) -> Any:
            asked.add(priority)
            return call(engine, *arguments, priority=priority)

        monkeypatch.setattr(FakeEngine, name, spy)

    spy_on("sample")
    spy_on("stream")
    spy_on("next_logprobs")
    expected = {
        policy_pb2.PRIORITY_UNSPECIFIED: REPLY_PRIORITY,
        policy_pb2.PRIORITY_INTERACTIVE: REPLY_PRIORITY,
        policy_pb2.PRIORITY_BACKGROUND: BACKGROUND_PRIORITY,
    }
    for priority, of_engine in expected.items():
        asked.clear()
        guidance = policy_pb2.GuidanceParams(strategy_name=strategy)
        await taught.generate("hello", priority=priority, guidance=guidance)
        assert asked == {of_engine}
    error = await refused(taught.generate("hello", priority=9))
    assert fields(error) == ["priority"]
