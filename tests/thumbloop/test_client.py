"""The typed clients, async and sync: what they send, what they return, raise and try again."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc
import pytest

from tests.serving import Running, running, until
from thumbloop.client import AsyncClient, Client
from thumbloop.config import State
from thumbloop.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestIdTaken,
    ThumbloopError,
    Unavailable,
)
from thumbloop.messages import GenerateOptions, generate_request, prompt_of
from thumbloop.types import Message, Prompt, Role, Strategy, User
from thumbloop.v1 import admin_pb2, feedback_pb2, feedback_pb2_grpc, policy_pb2, policy_pb2_grpc

HELLO = (Message(Role.USER, "hello"),)


class Talker(Protocol):
    """A client of either kind, as the tests below call it."""

    async def generate(self, prompt: Any, **how: Any) -> policy_pb2.GenerateResponse:
        """Return a reply."""

    async def stream(self, prompt: Any, **how: Any) -> tuple[list[str], Any]:
        """Return the pieces of a reply, and what the stream holds in the end."""

    async def rate(self, response_id: str, **how: Any) -> feedback_pb2.SubmitFeedbackResponse:
        """Give a thumb."""

    async def prefer(self, response_id: str, **how: Any) -> feedback_pb2.SubmitPreferenceResponse:
        """Compare two candidates."""

    async def versions(self) -> Any:
        """Return the versions."""


class Async:
    """The async client."""

    def __init__(self, address: str, **how: Any) -> None:
        self.client = AsyncClient(address, **how)
        self.generate = self.client.generate
        self.rate = self.client.rate
        self.prefer = self.client.prefer
        self.versions = self.client.versions
        self.trace = self.client.trace
        self.forget = self.client.forget

    async def stream(self, prompt: Any, **how: Any) -> tuple[list[str], Any]:
        stream = self.client.stream(prompt, **how)
        assert stream.reply is None
        return [piece async for piece in stream], stream.reply

    async def close(self) -> None:
        await self.client.close()


class Threaded:
    """The sync client, in a thread."""

    def __init__(self, address: str, **how: Any) -> None:
        self.client = Client(address, **how)

    async def generate(self, prompt: Any, **how: Any) -> policy_pb2.GenerateResponse:
        return await asyncio.to_thread(self.client.generate, prompt, **how)

    async def rate(self, response_id: str, **how: Any) -> feedback_pb2.SubmitFeedbackResponse:
        return await asyncio.to_thread(self.client.rate, response_id, **how)

    async def prefer(self, response_id: str, **how: Any) -> feedback_pb2.SubmitPreferenceResponse:
        return await asyncio.to_thread(self.client.prefer, response_id, **how)

    async def versions(self) -> Any:
        return await asyncio.to_thread(self.client.versions)

    async def trace(self, user_id: str, **how: Any) -> admin_pb2.GetUserLineageResponse:
        return await asyncio.to_thread(self.client.trace, user_id, **how)

    async def forget(self, user_id: str, **how: Any) -> feedback_pb2.DeleteUserDataResponse:
        return await asyncio.to_thread(self.client.forget, user_id, **how)

    async def stream(self, prompt: Any, **how: Any) -> tuple[list[str], Any]:
        stream = self.client.stream(prompt, **how)
        assert stream.reply is None
        return await asyncio.to_thread(list, stream), stream.reply

    async def close(self) -> None:
        self.client.close()


Connect = Callable[..., Talker]


@pytest.fixture(params=[Async, Threaded], ids=["async", "sync"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Makes clients of either kind, and closes them."""
    made: list[Any] = []

    def connect(port: int, **how: Any) -> Talker:
        made.append(request.param(f"127.0.0.1:{port}", **how))
        return made[-1]

    yield connect
    for client in made:
        await client.close()


@pytest.fixture
async def server(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Running]:
    limits = {"max_timeout_s": 60.0}
    async with running(tiny_model, State(folder=tmp_path / "state"), limits=limits) as server:
        yield server


@pytest.fixture
def client(server: Running, connect: Connect) -> Talker:
    return connect(server.port)


def test_what_is_not_said_is_left_to_the_server():
    request = generate_request(Prompt(messages=(Message(Role.USER, "hi"),)), GenerateOptions())
    (turn,) = request.chat.messages
    assert (turn.role, turn.content) == (policy_pb2.ROLE_USER, "hi")
    for field in ("max_tokens", "temperature", "top_p", "top_k", "seed"):
        assert not request.sampling.HasField(field)
    assert not request.guidance.HasField("num_candidates")
    assert request.guidance.strategy == policy_pb2.GUIDANCE_STRATEGY_UNSPECIFIED
    assert not request.HasField("policy_version")
    assert request.learning == policy_pb2.LEARNING_UNSPECIFIED


def test_what_is_said_is_sent_zeros_included():
    options = GenerateOptions(
        max_tokens=5,
        temperature=0.0,
        seed=0,
        strategy=Strategy.NONE,
        num_candidates=1,
        policy_version=0,
        is_excluded=True,
        include_candidates=True,
    )
    request = generate_request(
        Prompt(messages=(Message(Role.SYSTEM, "a"), Message(Role.ASSISTANT, "b"))), options
    )
    assert [m.role for m in request.chat.messages] == [
        policy_pb2.ROLE_SYSTEM,
        policy_pb2.ROLE_ASSISTANT,
    ]
    assert request.sampling.HasField("seed")
    assert request.sampling.HasField("temperature")
    assert request.HasField("policy_version")
    assert request.guidance.strategy == policy_pb2.GUIDANCE_STRATEGY_NONE
    assert request.learning == policy_pb2.LEARNING_EXCLUDED
    assert request.include_candidates


def test_every_strategy_has_a_name_on_the_wire():
    for strategy in Strategy:
        request = generate_request(Prompt(), GenerateOptions(strategy=strategy))
        assert request.guidance.strategy != policy_pb2.GUIDANCE_STRATEGY_UNSPECIFIED


def test_a_text_to_continue_is_sent_as_a_text():
    request = generate_request(Prompt(text="The soup"), GenerateOptions())
    assert (request.WhichOneof("prompt"), request.text) == ("text", "The soup")


def test_a_text_is_a_users_only_turn_unless_it_is_to_be_continued():
    assert prompt_of("hi", is_text=False) == Prompt(messages=(Message(Role.USER, "hi"),))
    assert prompt_of("hi", is_text=True) == Prompt(text="hi")
    assert prompt_of([*HELLO], is_text=True) == Prompt(messages=HELLO)


# Answers


async def test_a_reply_is_returned_and_stored(server: Running, client: Talker):
    reply = await client.generate(
        "hello", user_id="ann", session_id="s", request_id="q", options=GenerateOptions(seed=3)
    )
    stored = server.stored(reply.response_id)
    assert reply.text == stored.chosen.text
    assert stored.prompt == Prompt(messages=HELLO)
    assert (stored.user, stored.session_id, stored.request_id) == (User("", "ann"), "s", "q")
    assert stored.sampling.seed == 3


async def test_a_stream_holds_the_reply_when_its_text_has_been_read(
    server: Running, client: Talker
):
    options = GenerateOptions(seed=3, num_candidates=1)
    pieces, reply = await client.stream("hello", user_id="ann", options=options)
    assert "".join(pieces) == reply.text == server.stored(reply.response_id).chosen.text
    assert all(pieces)
    whole = await client.generate("hello", user_id="ann", options=options)
    assert (whole.text, whole.finish_reason) == (reply.text, reply.finish_reason)


async def test_a_text_is_continued_where_it_is_said_to_be_one(server: Running, client: Talker):
    reply = await client.generate("The soup was", is_text=True)
    assert server.stored(reply.response_id).prompt == Prompt(text="The soup was")


async def test_a_thumb_is_stored(client: Talker):
    reply = await client.generate("hello", user_id="ann")
    thumb = {"user_id": "ann", "comment": "lovely", "request_id": "q"}
    first = await client.rate(reply.response_id, up=True, **thumb)
    assert (first.feedback_id, first.policy_version, first.duplicate) == (1, 0, False)
    again = await client.rate(reply.response_id, up=True, **thumb)
    assert again.duplicate
    down = await client.rate(reply.response_id, up=False, user_id="ann", request_id="r")
    assert (down.feedback_id, down.duplicate) == (2, False)


async def test_a_preference_is_stored(client: Talker):
    two = GenerateOptions(num_candidates=2, include_candidates=True)
    reply = await client.generate("hello", user_id="ann", options=two)
    said = {"better": 1, "worse": 0, "user_id": "ann", "request_id": "q"}
    first = await client.prefer(reply.response_id, **said)
    assert (first.preference_id, first.duplicate) == (1, False)
    assert (await client.prefer(reply.response_id, **said)).duplicate
    with pytest.raises(NotFound):
        await client.prefer(reply.response_id, better=1, worse=0, user_id="bob")


async def test_a_user_is_traced_and_forgotten(client: Talker):
    await client.generate("hello", user_id="ann")
    await client.generate("hello", user_id="bob")
    traced = await client.trace("ann")
    assert (len(traced.learned), len(traced.descendants)) == (0, 0)
    assert (await client.forget("ann", subject="another")).interactions_erased == 0
    assert (await client.forget("ann")).interactions_erased == 1
    assert (await client.forget("ann")).interactions_erased == 0


async def test_versions_are_listed(client: Talker):
    listed = await client.versions()
    assert listed.current_version == 0
    assert [version.policy_version for version in listed.policy_versions] == [0]


async def test_a_client_closes_its_channel_with_its_block(server: Running):
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        await client.versions()
    with pytest.raises(grpc.aio.UsageError):
        await client.versions()

    def use() -> Client:
        with Client(f"127.0.0.1:{server.port}") as client:
            client.versions()
        return client

    closed = await asyncio.to_thread(use)
    with pytest.raises(ValueError, match="closed channel"):
        closed.versions()


async def test_threads_may_share_a_client(server: Running):
    with Client(f"127.0.0.1:{server.port}") as client:
        calls = [asyncio.to_thread(client.generate, f"hello {i}") for i in range(8)]
        replies = await asyncio.gather(*calls)
    assert len({reply.response_id for reply in replies}) == 8


# Giving up


async def test_a_stream_that_is_given_up_is_aborted(server: Running):
    server.engine.may_sample.clear()
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        stream = client.stream("hello")
        reading = asyncio.ensure_future(anext(aiter(stream)))
        await server.sampling(4)
        stream.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    await until(lambda: server.engine.aborted == 4)
    with Client(f"127.0.0.1:{server.port}") as client:
        stream = client.stream("hello")
        reading = asyncio.create_task(asyncio.to_thread(list, stream))
        await server.sampling(4)
        stream.cancel()
        with pytest.raises(ThumbloopError) as raised:
            await reading
        assert raised.value.code is grpc.StatusCode.CANCELLED
    await until(lambda: server.engine.aborted == 8)


async def test_a_task_that_is_cancelled_takes_its_call_with_it(server: Running):
    server.engine.may_sample.clear()
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:

        async def read() -> list[str]:
            return [piece async for piece in client.stream("hello")]

        for n, call in enumerate((client.generate("hello"), read()), 1):
            task = asyncio.ensure_future(call)
            await server.sampling(4)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda aborted=4 * n: server.engine.aborted == aborted)


async def test_a_call_gives_up_when_its_time_is_over(server: Running, connect: Connect):
    server.engine.may_sample.clear()
    hasty = connect(server.port, timeout_s=0.3)
    patient = connect(server.port)
    for call in (
        hasty.generate("hello"),
        hasty.stream("hello"),
        patient.generate("hello", timeout_s=0.3),
        patient.stream("hello", timeout_s=0.3),
    ):
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(call, 10)
    await until(lambda: server.engine.aborted == 16)


# Errors


async def test_whatever_is_wrong_with_a_request_is_told_field_by_field(client: Talker):
    options = GenerateOptions(temperature=9, num_candidates=0)
    for call in (client.generate, client.stream):
        with pytest.raises(InvalidRequest) as raised:
            await call("hello", user_id="u" * 257, options=options)
        fields = {violation.field: violation.description for violation in raised.value.violations}
        assert list(fields) == ["sampling.temperature", "guidance.num_candidates", "user_id"]
        assert all(fields.values())
        assert isinstance(raised.value.__cause__, grpc.RpcError)


async def test_a_full_server_says_when_to_come_back(server: Running, client: Talker):
    server.engine.is_full = True
    for call in (client.generate, client.stream):
        with pytest.raises(Overloaded) as raised:
            await call("hello")
        assert raised.value.retry_after_s == 0.25


async def test_what_does_not_exist_is_not_found(client: Talker):
    with pytest.raises(NotFound, match="no such response"):
        await client.rate("never given", up=True)
    with pytest.raises(NotFound, match="version 7"):
        await client.generate("hello", options=GenerateOptions(policy_version=7))


async def test_a_request_id_names_one_request(client: Talker):
    first = await client.generate("hello", request_id="q")
    assert (await client.generate("hello", request_id="q")).response_id == first.response_id
    pieces, again = await client.stream("hello", request_id="q")
    assert (again.response_id, "".join(pieces)) == (first.response_id, first.text)
    with pytest.raises(RequestIdTaken):
        await client.generate("another", request_id="q")


async def test_a_server_that_is_not_there_is_unavailable(connect: Connect, unused_port: int):
    with pytest.raises(Unavailable):
        await connect(unused_port).generate("hello")


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# Trying again


class Flaky(policy_pb2_grpc.PolicyServiceServicer, feedback_pb2_grpc.FeedbackServiceServicer):
    """Fails its first calls, and remembers what every call brought."""

    def __init__(self) -> None:
        self.failures: Sequence[grpc.StatusCode] = ()
        self.says_first = ""
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.times_left: list[float] = []

    async def _receive(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.times_left.append(context.time_remaining())
        if len(self.requests) <= len(self.failures):
            await context.abort(self.failures[len(self.requests) - 1], "as it was told")

    async def Generate(self, request: Any, context: Any) -> policy_pb2.GenerateResponse:
        await self._receive(request, context)
        return policy_pb2.GenerateResponse(text="hello")

    async def StreamGenerate(self, request: Any, context: Any) -> None:  # type: ignore[override]
        if self.says_first:
            await context.write(policy_pb2.StreamGenerateResponse(text_delta=self.says_first))
        await self._receive(request.request, context)
        reply = policy_pb2.GenerateResponse(text="hello")
        await context.write(policy_pb2.StreamGenerateResponse(text_delta="hello"))
        await context.write(policy_pb2.StreamGenerateResponse(response=reply))

    async def SubmitFeedback(
        self, request: Any, context: Any
    ) -> feedback_pb2.SubmitFeedbackResponse:
        await self._receive(request, context)
        return feedback_pb2.SubmitFeedbackResponse(feedback_id=1)


@pytest.fixture
async def flaky() -> AsyncIterator[tuple[Flaky, int]]:
    """A server that fails, and its port."""
    servicer, server = Flaky(), grpc.aio.server()
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(servicer, server)
    feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, port
    await server.stop(None)


CALLS = {
    "generate": lambda client: client.generate("hello"),
    "stream": lambda client: client.stream("hello"),
    "rate": lambda client: client.rate("r", up=True),
}
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("name", CALLS)
async def test_what_is_unavailable_is_tried_again_under_the_same_request_id(
    flaky: tuple[Flaky, int], connect: Connect, name: str
):
    servicer, port = flaky
    servicer.failures = (UNAVAILABLE, UNAVAILABLE)
    answer = await CALLS[name](connect(port))
    assert answer
    assert len(servicer.requests) == 3
    assert all(request == servicer.requests[0] for request in servicer.requests)
    assert servicer.requests[0].request_id
    attempts = [metadata.get("grpc-previous-rpc-attempts") for metadata in servicer.metadata]
    assert attempts == [None, "1", "2"]


async def test_what_stays_unavailable_is_raised_in_the_end(
    flaky: tuple[Flaky, int], connect: Connect
):
    servicer, port = flaky
    servicer.failures = (UNAVAILABLE,) * 9
    with pytest.raises(Unavailable, match="as it was told"):
        await connect(port).generate("hello")
    assert len(servicer.requests) == 4


OTHERS = [code for code in grpc.StatusCode if code not in (grpc.StatusCode.OK, UNAVAILABLE)]


@pytest.mark.parametrize("name", CALLS)
async def test_nothing_else_is_tried_again(flaky: tuple[Flaky, int], connect: Connect, name: str):
    servicer, port = flaky
    client = connect(port)
    for code in OTHERS:
        servicer.failures, servicer.requests = (code,), []
        with pytest.raises((ThumbloopError, asyncio.CancelledError)):
            await CALLS[name](client)
        assert len(servicer.requests) == 1, code


async def test_a_stream_that_has_begun_is_not_tried_again(
    flaky: tuple[Flaky, int], connect: Connect
):
    servicer, port = flaky
    servicer.says_first, servicer.failures = "hel", (UNAVAILABLE,)
    with pytest.raises(Unavailable):
        await connect(port).stream("hello")
    assert len(servicer.requests) == 1


async def test_every_request_has_an_id_of_its_own_unless_it_is_given_one(
    flaky: tuple[Flaky, int], connect: Connect
):
    servicer, port = flaky
    client = connect(port)
    for _ in range(2):
        await client.generate("hello")
        await client.stream("hello")
        await client.rate("r", up=True)
    await client.generate("hello", request_id="mine")
    await client.rate("r", up=True, request_id="mine too")
    *ids, last_but_one, last = [request.request_id for request in servicer.requests]
    assert (last_but_one, last) == ("mine", "mine too")
    assert len(set(ids)) == 6
    assert all(ids)


async def test_a_token_is_sent_with_every_call_and_only_where_there_is_one(
    flaky: tuple[Flaky, int], connect: Connect
):
    servicer, port = flaky
    for token, sent in (("secret", "Bearer secret"), ("", None)):
        client = connect(port, token=token)
        servicer.metadata = []
        for call in CALLS.values():
            await call(client)
        assert [metadata.get("authorization") for metadata in servicer.metadata] == [sent] * 3


async def test_the_servers_deadline_is_the_clients(flaky: tuple[Flaky, int], connect: Connect):
    servicer, port = flaky
    client = connect(port, timeout_s=50)
    await client.generate("hello")
    await client.stream("hello", timeout_s=20)
    await client.rate("r", up=True, timeout_s=10)
    expected = (50, 20, 10)
    assert servicer.times_left == [pytest.approx(seconds, abs=5) for seconds in expected]
