"""Requests at the edges of every field: each is answered or refused with a documented status."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.refusals import fields, refused
from tests.serving import Running, running
from thumbloop.config import State
from thumbloop.v1 import admin_pb2, feedback_pb2, policy_pb2

EXAMPLES = 5_000
SET_AT_ONCE = 3
BATCH = 250  # calls under way at once
DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
}
MOVES = (admin_pb2.PromotePolicyVersionRequest, admin_pb2.RollbackPolicyVersionRequest)

TEXTS = ["", " ", "\n", "\x00", "hello", "ünïcödé \U0001f600", "a" * 128, "a" * 129, "b" * 256,
         "b" * 257, "c" * 4097, "9" * 5000, "<|up|>", "../../etc/passwd", "'; DROP TABLE interactions; --"]  # fmt: skip
REALS = [0.0, -0.0, 0.005, 0.01, 0.5, 1.0, 1.0000001, 2.0, 2.1, 100.0, 101.0, -1.0, 1e308, -1e308,
         float("inf"), float("-inf"), float("nan"), 5e-324]  # fmt: skip
BITS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
}
NEAR = [0, 1, 2, 15, 16, 17, 1000, 1001, 1024, 1025, 1_000_000, 1_000_001]


def value_of(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Return values at the edges of a field; a kind of field that is not known here fails."""
    if field.message_type is not None:
        return message_of(field.message_type._concrete_class)
    if field.enum_type is not None:
        return st.sampled_from([*(v.number for v in field.enum_type.values), 99])
    if field.type in BITS:
        low, high = BITS[field.type]
        return st.sampled_from([n for n in [low, *NEAR, high] if low <= n <= high])
    return {
        FieldDescriptor.TYPE_STRING: st.sampled_from(TEXTS),
        FieldDescriptor.TYPE_DOUBLE: st.sampled_from(REALS),
        FieldDescriptor.TYPE_BOOL: st.booleans(),
    }[field.type]


def message_of(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Return messages with a few fields at one of their edges; the others are right."""

    def build(given: dict[str, Any]) -> Message:
        message = kind()
        if isinstance(message, policy_pb2.GenerateRequest):
            message.text = "hello"
        for name, value in given.items():
            field = kind.DESCRIPTOR.fields_by_name[name]
            if field.is_repeated:
                getattr(message, name).extend(value)
            elif field.message_type is not None:
                getattr(message, name).CopyFrom(value)
            else:
                setattr(message, name, value)
        return message

    fields = {}
    for field in kind.DESCRIPTOR.fields:
        one = value_of(field)
        fields[field.name] = st.lists(one, max_size=9) if field.is_repeated else one
    if "policy" in fields:
        fields["policy"] = st.sampled_from(["", "default", "default", "other", "x" * 300])

    def some(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({name: fields[name] for name in names})

    few = st.lists(st.sampled_from(sorted(fields)), unique=True, min_size=1, max_size=SET_AT_ONCE)
    return few.flatmap(some).map(build)


@pytest.fixture
async def server(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A server that turns nobody away: a RESOURCE_EXHAUSTED is gRPC's, which has dropped a status."""
    limits = {"max_tokens": 1024, "max_queued_candidates": BATCH * 16}
    async with running(tiny_model, state, limits=limits) as server:
        yield server


def calls_of(server: Running) -> dict[type[Message], Callable[[Any], Awaitable[object]]]:
    async def stream(request: Any) -> None:
        async for _ in server.policy.StreamGenerate(request):
            pass

    return {
        policy_pb2.GenerateRequest: server.policy.Generate,
        policy_pb2.StreamGenerateRequest: stream,
        feedback_pb2.SubmitFeedbackRequest: server.feedback.SubmitFeedback,
        feedback_pb2.SubmitPreferenceRequest: server.feedback.SubmitPreference,
        feedback_pb2.DeleteUserDataRequest: server.feedback.DeleteUserData,
        admin_pb2.ListPolicyVersionsRequest: server.admin.ListPolicyVersions,
        admin_pb2.GetPolicyVersionRequest: server.admin.GetPolicyVersion,
        admin_pb2.PromotePolicyVersionRequest: server.admin.PromotePolicyVersion,
        admin_pb2.RollbackPolicyVersionRequest: server.admin.RollbackPolicyVersion,
        admin_pb2.ImportFeedbackRequest: server.admin.ImportFeedback,
    }


def requests() -> list[Message]:
    """Return at least EXAMPLES requests, the same ones in every run."""
    kinds = [
        *[policy_pb2.GenerateRequest] * 10,
        *[policy_pb2.StreamGenerateRequest] * 10,
        *[feedback_pb2.SubmitFeedbackRequest] * 4,
        feedback_pb2.SubmitPreferenceRequest,
        feedback_pb2.DeleteUserDataRequest,
        admin_pb2.ListPolicyVersionsRequest,
        admin_pb2.GetPolicyVersionRequest,
        admin_pb2.PromotePolicyVersionRequest,
        admin_pb2.RollbackPolicyVersionRequest,
        admin_pb2.ImportFeedbackRequest,
    ]
    found: list[Message] = []

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of([message_of(kind) for kind in kinds]))
    def collect(message: Message) -> None:
        found.append(message)

    collect()
    return found


async def test_whatever_is_sent_is_answered_or_refused_with_a_documented_status(server: Running):
    calls, statuses = calls_of(server), Counter[tuple[str, grpc.StatusCode]]()
    odd: list[tuple[Message, str]] = []

    async def send(message: Message) -> None:
        code, words = grpc.StatusCode.OK, ""
        try:
            await calls[type(message)](message)
        except grpc.aio.AioRpcError as error:
            code, words = error.code(), error.details() or ""
        statuses[type(message).__name__, code] += 1
        is_conflict = isinstance(message, MOVES) and code is grpc.StatusCode.ABORTED
        if code not in DOCUMENTED and not is_conflict:
            odd.append((message, f"{code.name}: {words}"))

    asked = await asyncio.to_thread(requests)
    for start in range(0, len(asked), BATCH):
        await asyncio.gather(*(send(message) for message in asked[start : start + BATCH]))
    assert odd == []
    assert statuses.total() >= EXAMPLES
    assert {name for name, _ in statuses} == {kind.__name__ for kind in calls}
    for kind in ("GenerateRequest", "StreamGenerateRequest", "ListPolicyVersionsRequest"):
        assert statuses[kind, grpc.StatusCode.OK] >= 10


async def test_a_thousand_wrong_turns_are_refused_with_the_names_of_the_first(server: Running):
    chat = policy_pb2.Chat(messages=[policy_pb2.ChatMessage()] * 1000)
    wanted = policy_pb2.GenerateRequest(chat=chat)
    streamed = policy_pb2.StreamGenerateRequest(request=wanted)
    for call in (server.policy.Generate(wanted), server.policy.StreamGenerate(streamed).read()):
        error = await refused(call)
        assert fields(error) == [
            f"chat.messages[{i}].{part}" for i in range(8) for part in ("role", "content")
        ]
        assert (error.details() or "").endswith("; and 1984 more")


async def test_a_name_of_a_megabyte_is_refused_and_hardly_repeated(server: Running):
    name = "\U0001f600" * 250_000
    wanted = policy_pb2.GenerateRequest(text="hello")
    wanted.guidance.strategy_name = name
    error = await refused(server.policy.Generate(wanted))
    assert fields(error) == ["guidance.strategy_name"] * 2
    assert 0 < (error.details() or "").count(name[0]) < 20
    for text in ("user_id", "session_id", "request_id"):
        error = await refused(server.generate("hello", **{text: name}))
        assert fields(error) == [text]
