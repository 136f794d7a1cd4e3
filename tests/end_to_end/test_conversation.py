"""One conversation held by five clients, ours and others', with the real engine behind one server.

Each asks, asks again as a stream, rates, and is refused; all have to hear and leave behind the same.
"""

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grpc
import openai
import pytest
import pytest_asyncio
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.serving import Running
from thumbloop.client import AsyncClient, Client, GenerateOptions
from thumbloop.errors import ThumbloopError
from thumbloop.store import feedback, reading
from thumbloop.types import DEFAULT_POLICY, Message, Prompt, Role, User

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROOT = Path(__file__).parents[2]
TOKEN = "the-token-of-a-backend"
SUBJECT = "backend"
QUESTION = "What did you think of the film?"
SEED = 5
MAX_TOKENS = 12
TOO_WARM = 9.0


class Reply(NamedTuple):
    """What a client heard."""

    response_id: str
    text: str
    policy_version: int


class Talker(Protocol):
    """Somebody who asks QUESTION for Ann, with SEED and MAX_TOKENS."""

    async def ask(self, *, temperature: float = 1.0) -> Reply | str:
        """Return the reply, or the name of the status of the refusal."""

    async def listen(self) -> tuple[list[str], Reply]:
        """Return the pieces of a streamed reply, and the reply."""

    async def rate(self, response_id: str, *, up: bool, user: str) -> int | str:
        """Return the number of the stored thumb, or the name of the status of the refusal."""

    async def close(self) -> None:
        """Hang up."""


def _reply(response: Any) -> Reply:
    return Reply(response.response_id, response.text, response.policy_version)


class OfAsyncClient:
    """thumbloop.AsyncClient."""

    def __init__(self, port: int, _http_port: int) -> None:
        self._client = AsyncClient(f"127.0.0.1:{port}", token=TOKEN)

    async def ask(self, *, temperature: float = 1.0) -> Reply | str:
        options = GenerateOptions(seed=SEED, max_tokens=MAX_TOKENS, temperature=temperature)
        try:
            return _reply(await self._client.generate(QUESTION, user_id="ann", options=options))
        except ThumbloopError as error:
            return error.code.name

    async def listen(self) -> tuple[list[str], Reply]:
        options = GenerateOptions(seed=SEED, max_tokens=MAX_TOKENS)
        stream = self._client.stream(QUESTION, user_id="ann", options=options)
        return [piece async for piece in stream], _reply(stream.reply)

    async def rate(self, response_id: str, *, up: bool, user: str) -> int | str:
        try:
            return (await self._client.rate(response_id, up=up, user_id=user)).feedback_id
        except ThumbloopError as error:
            return error.code.name

    async def close(self) -> None:
        await self._client.close()


class OfClient:
    """thumbloop.Client."""

    def __init__(self, port: int, _http_port: int) -> None:
        self._client = Client(f"127.0.0.1:{port}", token=TOKEN)

    async def ask(self, *, temperature: float = 1.0) -> Reply | str:
        options = GenerateOptions(seed=SEED, max_tokens=MAX_TOKENS, temperature=temperature)
        how: Any = {"user_id": "ann", "options": options}
        try:
            return _reply(await asyncio.to_thread(self._client.generate, QUESTION, **how))
        except ThumbloopError as error:
            return error.code.name

    async def listen(self) -> tuple[list[str], Reply]:
        options = GenerateOptions(seed=SEED, max_tokens=MAX_TOKENS)
        stream = self._client.stream(QUESTION, user_id="ann", options=options)
        return await asyncio.to_thread(list, stream), _reply(stream.reply)

    async def rate(self, response_id: str, *, up: bool, user: str) -> int | str:
        try:
            stored = await asyncio.to_thread(self._client.rate, response_id, up=up, user_id=user)
        except ThumbloopError as error:
            return error.code.name
        return stored.feedback_id

    async def close(self) -> None:
        self._client.close()


class OfOpenAi:
    """OpenAI's own client."""

    def __init__(self, _port: int, http_port: int) -> None:
        self._client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{http_port}/v1", api_key=TOKEN, max_retries=0
        )

    async def _create(self, **how: Any) -> Any:
        return await self._client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": QUESTION}],
            user="ann",
            seed=SEED,
            max_completion_tokens=MAX_TOKENS,
            **how,
        )

    async def ask(self, *, temperature: float = 1.0) -> Reply | str:
        try:
            reply = await self._create(temperature=temperature)
        except openai.APIStatusError as error:
            return _status(error)
        version = reply.model_extra["thumbloop"]["policy_version"]
        return Reply(reply.id, reply.choices[0].message.content, version)

    async def listen(self) -> tuple[list[str], Reply]:
        stream = await self._create(stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        *_, last, usage = chunks
        pieces = [c.choices[0].delta.content for c in chunks if c.choices]
        text = "".join(piece or "" for piece in pieces)
        assert usage.usage is not None
        assert usage.usage.completion_tokens <= MAX_TOKENS
        return (
            [piece for piece in pieces if piece],
            Reply(last.id, text, last.model_extra["thumbloop"]["policy_version"]),
        )

    async def rate(self, response_id: str, *, up: bool, user: str) -> int | str:
        thumb = {"response_id": response_id, "thumb": "up" if up else "down", "user": user}
        try:
            stored: Any = await self._client.post("/feedback", body=thumb, cast_to=object)
        except openai.APIStatusError as error:
            return _status(error)
        return int(stored["id"])

    async def close(self) -> None:
        await self._client.close()


def _status(error: openai.APIStatusError) -> str:
    assert error.code is not None
    return error.code.upper()


class OfReflection:
    """Plain grpcio, which learns from the server itself what may be called: no generated code."""

    def __init__(self, port: int, _http_port: int) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._pool = DescriptorPool(ProtoReflectionDescriptorDatabase(self._channel))

    def _call(self, service: str, name: str, **fields: Any) -> list[Any]:
        """Return every response of a call."""
        method = self._pool.FindServiceByName(f"thumbloop.v1.{service}").methods_by_name[name]
        request = json_format.ParseDict(fields, GetMessageClass(method.input_type)())
        connect = (
            self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        )
        call = connect(
            f"/thumbloop.v1.{service}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        answer = call(request, metadata=[("authorization", f"Bearer {TOKEN}")], timeout=60)
        return list(answer) if method.server_streaming else [answer]

    def _request(self, temperature: float = 1.0) -> dict[str, Any]:
        return {
            "chat": {"messages": [{"role": "ROLE_USER", "content": QUESTION}]},
            "sampling": {"seed": SEED, "maxTokens": MAX_TOKENS, "temperature": temperature},
            "userId": "ann",
        }

    async def ask(self, *, temperature: float = 1.0) -> Reply | str:
        request = self._request(temperature)
        try:
            (reply,) = await asyncio.to_thread(self._call, "PolicyService", "Generate", **request)
        except grpc.RpcError as error:
            return error.code().name
        return _reply(reply)

    async def listen(self) -> tuple[list[str], Reply]:
        *pieces, last = await asyncio.to_thread(
            self._call, "PolicyService", "StreamGenerate", request=self._request()
        )
        return [piece.text_delta for piece in pieces], _reply(last.response)

    async def rate(self, response_id: str, *, up: bool, user: str) -> int | str:
        thumb = {"responseId": response_id, "thumb": f"THUMB_{'UP' if up else 'DOWN'}"}
        try:
            (stored,) = await asyncio.to_thread(
                self._call, "FeedbackService", "SubmitFeedback", **thumb, userId=user
            )
        except grpc.RpcError as error:
            return error.code().name
        return int(stored.feedback_id)

    async def close(self) -> None:
        self._channel.close()


class OfCurl:
    """curl."""

    def __init__(self, _port: int, http_port: int) -> None:
        self._url = f"http://127.0.0.1:{http_port}/v1"

    async def _post(self, path: str, body: dict[str, Any]) -> str:
        command = ["curl", "--silent", "--show-error", "--no-buffer", "--json", json.dumps(body)]
        process = await asyncio.create_subprocess_exec(
            *command,
            *("--header", f"Authorization: Bearer {TOKEN}"),
            f"{self._url}/{path}",
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        return output.decode()

    def _body(self, **more: Any) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": QUESTION}],
            "user": "ann",
            "seed": SEED,
            "max_tokens": MAX_TOKENS,
            **more,
        }

    async def ask(self, *, temperature: float = 1.0) -> Reply | str:
        body = self._body(temperature=temperature)
        answer = json.loads(await self._post("chat/completions", body))
        if "error" in answer:
            return str(answer["error"]["code"]).upper()
        said = answer["choices"][0]["message"]["content"]
        return Reply(answer["id"], said, answer["thumbloop"]["policy_version"])

    async def listen(self) -> tuple[list[str], Reply]:
        answer = await self._post("chat/completions", self._body(stream=True))
        *events, done, rest = answer.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        pieces = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
        version = chunks[-1]["thumbloop"]["policy_version"]
        said = [piece for piece in pieces if piece]
        return said, Reply(chunks[-1]["id"], "".join(said), version)

    async def rate(self, response_id: str, *, up: bool, user: str) -> int | str:
        thumb = {"response_id": response_id, "thumb": "up" if up else "down", "user": user}
        answer = json.loads(await self._post("feedback", thumb))
        if "error" in answer:
            return str(answer["error"]["code"]).upper()
        return int(answer["id"])

    async def close(self) -> None:
        """Nothing is open."""


TALKERS = [OfAsyncClient, OfClient, OfOpenAi, OfReflection, OfCurl]


@pytest_asyncio.fixture(loop_scope="session")
async def server(
    lend: Callable[..., AbstractAsyncContextManager[Running]],
) -> AsyncIterator[Running]:
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    scopes = ["generate", "feedback", "on_behalf"]
    token = {"sha256": digest, "scopes": scopes}
    async with lend(access={"tokens": {SUBJECT: token}}) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="session", params=TALKERS, ids=lambda kind: kind.__name__)
async def talker(request: pytest.FixtureRequest, server: Running) -> AsyncIterator[Talker]:
    talker = request.param(server.port, server.application.http_port)
    yield talker
    await talker.close()


def thumbs(server: Running) -> list[tuple[str, int]]:
    assert server.database is not None
    with reading(server.database) as connection:
        return [
            (rated.response_id, rated.value)
            for rated in feedback.list_rated(connection, DEFAULT_POLICY)
        ]


async def test_the_same_conversation_is_held_by_every_client(server: Running, talker: Talker):
    asked = await talker.ask()
    assert isinstance(asked, Reply)
    stored = server.stored(asked.response_id)
    assert asked == Reply(stored.response_id, stored.chosen.text, 0)
    assert asked.text
    assert stored.prompt == Prompt(messages=(Message(Role.USER, QUESTION),))
    assert stored.user == User(SUBJECT, "ann")
    assert (stored.sampling.seed, stored.sampling.max_tokens) == (SEED, MAX_TOKENS)
    assert len(stored.candidates) == 4

    pieces, heard = await talker.listen()
    assert heard.response_id != asked.response_id
    assert "".join(pieces) == heard.text == server.stored(heard.response_id).chosen.text
    assert server.stored(heard.response_id).sampling == stored.sampling

    assert await talker.rate(asked.response_id, up=True, user="ann") == 1
    assert await talker.rate(heard.response_id, up=False, user="ann") == 2
    assert sorted(thumbs(server)) == sorted([(asked.response_id, 1), (heard.response_id, 0)])

    assert await talker.ask(temperature=TOO_WARM) == "INVALID_ARGUMENT"
    assert await talker.rate(asked.response_id, up=False, user="bob") == "NOT_FOUND"
    assert await talker.rate("never-given", up=False, user="ann") == "NOT_FOUND"
    assert len(thumbs(server)) == 2


LIGHT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "vllm", "transformers", "peft", "server"}:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())

from thumbloop.client import Client

address, token = sys.argv[1:]
with Client(address, token=token) as client:
    reply = client.generate("hello", user_id="ann")
    stream = client.stream("hello", user_id="ann")
    assert "".join(stream) == stream.reply.text
    assert client.rate(reply.response_id, up=True, user_id="ann").feedback_id == 1
    print(reply.response_id, end="")
"""


async def test_the_client_needs_neither_torch_nor_vllm(server: Running):
    command = [sys.executable, "-c", LIGHT, f"127.0.0.1:{server.port}", TOKEN]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert server.stored(done.stdout).user == User(SUBJECT, "ann")
