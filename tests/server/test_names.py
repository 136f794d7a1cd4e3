"""What callers call things is data: whatever a name looks like, it is never a path to a file."""

import asyncio
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from google.protobuf.message import Message

from server.bodies import ChatBody, CompletionBody, FeedbackBody
from tests.serving import Running, running
from thumbloop.config import State
from thumbloop.v1 import admin_pb2, feedback_pb2, policy_pb2

TURN = policy_pb2.ChatMessage(role=policy_pb2.ROLE_USER, content="hello")
ANSWERED_OR_REFUSED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
}


def right_requests(response_id: str) -> list[tuple[str, Message]]:
    """Return right requests for every RPC, by its path on the wire."""
    chat = policy_pb2.GenerateRequest(chat=policy_pb2.Chat(messages=[TURN]))
    text = policy_pb2.GenerateRequest(text="hello")
    thumb = feedback_pb2.SubmitFeedbackRequest(
        response_id=response_id, thumb=feedback_pb2.THUMB_DOWN
    )
    right = [chat, text, policy_pb2.StreamGenerateRequest(request=text), thumb]
    found = []
    for file in (policy_pb2, feedback_pb2, admin_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                kind = method.input_type._concrete_class
                path = f"/{service.full_name}/{method.name}"
                requests = [request for request in right if isinstance(request, kind)]
                found.extend((path, request) for request in requests or [kind()])
    return found


def with_name(message: Message, name: str) -> Iterator[Message]:
    """Yield copies of a message; in each another one of its texts, at any depth, is the name."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.type == field.TYPE_STRING:
            copy = deepcopy(message)
            if field.is_repeated:
                getattr(copy, field.name).append(name)
            else:
                setattr(copy, field.name, name)
            yield copy
        elif field.message_type is not None:
            inner = enumerate(value) if field.is_repeated else [(None, value)]
            for i, part in inner:
                for changed in with_name(part, name):
                    copy = deepcopy(message)
                    place = getattr(copy, field.name)
                    (place if i is None else place[i]).CopyFrom(changed)
                    yield copy


async def send(server: Running, path: str, request: Message) -> grpc.StatusCode:
    """Make a call; return its status."""
    packed, channel = request.SerializeToString(), server.channel
    try:
        if isinstance(request, policy_pb2.StreamGenerateRequest):
            async for _ in channel.unary_stream(path)(packed):
                pass
        else:
            await channel.unary_unary(path)(packed)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def call_everything(server: Running, name: str) -> None:
    """Put the name wherever a request of either wire has text, one place at a time."""
    reply = await server.generate("hello")
    calls = [
        send(server, path, named)
        for path, request in right_requests(reply.response_id)
        for named in with_name(request, name)
    ]
    assert set(await asyncio.gather(*calls)) == ANSWERED_OR_REFUSED
    kept = await server.generate("hello", session_id=name, request_id=name, user_id=name)
    stored = server.stored(kept.response_id)
    assert (stored.session_id, stored.user.user_id) == (name, name)
    url = f"http://127.0.0.1:{server.application.http_port}"
    async with httpx2.AsyncClient(base_url=url) as client:
        bodies = named_bodies(reply.response_id, name)
        answers = await asyncio.gather(*(client.post(path, json=body) for path, body in bodies))
    assert {answer.status_code for answer in answers} == {200, 400, 404, 409}


def named_bodies(response_id: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a body for each field of each route that takes one."""
    turns = [{"role": "user", "content": "hello"}]
    for path, kind, right in (
        ("/v1/chat/completions", ChatBody, {"messages": turns}),
        ("/v1/completions", CompletionBody, {"prompt": "hello"}),
        ("/v1/feedback", FeedbackBody, {"response_id": response_id, "thumb": "down"}),
    ):
        for field in [*kind.model_fields, name]:
            yield path, {**right, field: name}
        yield path, {**right, "guidance": {"strategy": name}}
        yield path, {**right, "model": f"default:{name}"}


def files_under(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


async def test_no_name_becomes_a_path(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same calls under ordinary names and under others leave the same files."""
    odd_names = ["../../x", f"{tmp_path}/x", "a/../../b", "..", "x\ny", "versions/default/1"]
    found = []
    for names in (["x", "b"], odd_names):
        root = tmp_path / f"run{len(found)}"
        working = root / "a" / "b" / "c"  # so deep that the way out of it still ends under `root`
        working.mkdir(parents=True)
        monkeypatch.chdir(working)
        async with running(tiny_model, State(folder=root / "d" / "e" / "state")) as server:
            for name in names:
                await call_everything(server, name)
            found.append(files_under(root))
    ordinary, odd = found
    assert odd == ordinary
    assert {path.parts[0] for path in files_under(tmp_path)} == {"run0", "run1"}
