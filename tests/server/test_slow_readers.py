"""Readers that stop reading a stream that never ends: what they cost, and that they end."""

import asyncio
import gc
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2

from server.engine import Sampled
from tests.fakes import FakeEngine
from tests.neighbours import MODEST, UnhurriedEngine, calls, least_of, success, typical_s
from tests.over_http import head_of
from tests.refusals import detail_of
from tests.serving import Running, running, until
from thumbloop.config import State
from thumbloop.types import FinishReason, Sampling
from thumbloop.v1 import policy_pb2, policy_pb2_grpc

READERS = 100
UNREAD = 32_768
WORD = "endless " * 128
STREAM_WINDOW = 65_535
WINDOWS = [  # HTTP/2's own, which gRPC would let grow
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", STREAM_WINDOW),
]
ENDLESS = policy_pb2.StreamGenerateRequest(
    request=policy_pb2.GenerateRequest(
        text="endless", guidance=policy_pb2.GuidanceParams(num_candidates=1)
    )
)
OTHER = policy_pb2.GenerateRequest(text="hello")
ALL_OF_IT = policy_pb2.StreamGenerateRequest(request=OTHER)


class Wordy:
    """A tokenizer whose every token of a reply is a long word."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, token_ids: Sequence[int], **_options: Any) -> str:
        return WORD * len(token_ids)


class EndlessEngine(UnhurriedEngine):
    """Streams never end, for prompts that say so; the others' replies take their time."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.endless = self.tokenizer.encode("endless")
        self.pace_s = 0.02  # of a hundred streams: 5,000 tokens a second, a large engine's pace
        self.said = 0

    async def stream(
        self, prompt: Sequence[int], sampling: Sampling, *rest: Any, **more: Any
    ) -> AsyncGenerator[Sampled, None]:
        if list(prompt) != self.endless:
            async for sampled in super().stream(prompt, sampling, *rest, **more):
                yield sampled
            return
        self.streaming += 1
        count = 0
        try:
            while True:
                count += 1
                self.said += 1
                yield Sampled((40,) * count, (-1.0,) * count, FinishReason.ABORTED)
                await asyncio.sleep(self.pace_s)
        finally:
            self.streaming -= 1


def wordy(model: Path, _config: object) -> FakeEngine:
    engine = EndlessEngine(model)
    engine.tokenizer = Wordy(engine.tokenizer)
    return engine


@pytest.fixture
async def server(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    limits = {"max_unread_characters": UNREAD}
    async with running(tiny_model, state, make_engine=wordy, limits=limits) as server:
        yield server


def memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


async def watch(most: list[int]) -> None:
    while True:
        most.append(memory())
        await asyncio.sleep(0.1)


def handlers() -> int:
    """Return how many streams gRPC's handlers still answer."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return sum("HandleExceptions" in name and "StreamGenerate" in name for name in names)


async def rest_of(call: Any) -> tuple[str, grpc.aio.AioRpcError]:
    """Read what is left of a stream that has to end with an error."""
    text = ""
    while True:
        try:
            event = await call.read()
        except grpc.aio.AioRpcError as error:
            return text, error
        assert event is not grpc.aio.EOF, "it has to fail"
        text += event.text_delta


async def stuck_readers(stack: AsyncExitStack, server: Running) -> list[Any]:
    """Begin to read endless streams over ten connections, and leave them there."""
    stubs = []
    for _ in range(READERS // 10):
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=WINDOWS)
        stubs.append(policy_pb2_grpc.PolicyServiceStub(await stack.enter_async_context(channel)))
    readers = [stubs[i % len(stubs)].StreamGenerate(ENDLESS) for i in range(READERS)]
    for reader in readers:
        assert (await reader.read()).text_delta.startswith(WORD)
    return readers


async def test_readers_that_stop_reading_lose_their_streams_and_cost_no_more_than_the_limit(
    server: Running,
):
    engine, queue = server.engine, server.application._admission
    async with AsyncExitStack() as stack:
        readers = await stuck_readers(stack, server)
        before, most = memory(), [0]
        watching = asyncio.create_task(watch(most))
        await until(lambda: engine.said * len(WORD) > READERS * STREAM_WINDOW)  # windows are full
        async with asyncio.timeout(100):
            while engine.streaming:
                assert (await server.policy.Generate(OTHER, timeout=5)).text
        await until(lambda: not handlers(), 5)
        watching.cancel()
        assert engine.said * len(WORD) > READERS * (STREAM_WINDOW + UNREAD)
        assert max(most) - before < 4 * READERS * (STREAM_WINDOW + UNREAD)
        assert (queue.candidates, queue.tokens, queue.queued) == (0, 0, 0)
        assert server.application._lifecycle.in_flight == 0
        text, error = await rest_of(readers[0])  # it is not too late to hear why
        assert set(text) <= set(WORD)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "characters of this stream were not read" in error.details()
        assert detail_of(error, error_details_pb2.RetryInfo).retry_delay.ToSeconds() == 1


async def test_readers_that_stop_reading_cost_the_others_no_time(server: Running):
    async def cost() -> float:
        alone = await calls(server, MODEST, per_s=20, duration_s=3)
        async with AsyncExitStack() as stack:
            readers = await stuck_readers(stack, server)
            beside = await calls(server, MODEST, per_s=20, duration_s=3)
            await until(lambda: not server.engine.streaming)
            for reader in readers:
                reader.cancel()
        assert success(alone) == success(beside) == 1
        return typical_s(beside) / typical_s(alone)

    assert await least_of(cost, enough=1.5) <= 1.5


@asynccontextmanager
async def reader_without_room(
    server: Running, request: policy_pb2.StreamGenerateRequest
) -> AsyncIterator[Any]:
    """Ask for a stream whose first piece does not fit before somebody reads."""
    tiny = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    tiny.append(("grpc.http2.lookahead_bytes", len(WORD) // 2))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=tiny) as channel:
        yield policy_pb2_grpc.PolicyServiceStub(channel).StreamGenerate(request)


async def test_a_reader_that_takes_nothing_at_all_loses_its_stream_too(server: Running):
    async with reader_without_room(server, ENDLESS) as reader:
        await until(lambda: server.engine.streaming == 1)
        await until(lambda: server.engine.streaming == 0)
        await until(lambda: not handlers(), 5)
        async with asyncio.timeout(5):
            text, error = await rest_of(reader)
        assert text.startswith(WORD)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_finished_reply_that_nobody_reads_holds_its_place_until_time_is_up(
    tiny_model: Path, state: State
):
    limits = {"default_timeout_s": 1.5}
    async with (
        running(tiny_model, state, make_engine=wordy, limits=limits) as server,
        reader_without_room(server, ALL_OF_IT) as reader,
    ):
        await until(lambda: server.engine.finished)
        await asyncio.sleep(0.3)
        assert server.application._lifecycle.in_flight == 1
        await until(lambda: not handlers(), 5)
        assert server.application._lifecycle.in_flight == 0
        async with asyncio.timeout(5):
            _, error = await rest_of(reader)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_server_that_stops_lets_readers_finish(tiny_model: Path, state: State):
    async with (
        running(tiny_model, state, make_engine=wordy) as server,
        reader_without_room(server, ALL_OF_IT) as reader,
    ):
        await until(lambda: server.engine.finished)
        stopping = asyncio.create_task(server.application.stop())
        await asyncio.sleep(2)
        assert not stopping.done()
        *deltas, last = [event async for event in reader]
        assert "".join(event.text_delta for event in deltas) == last.response.text
        await stopping


def connections(port: int) -> int:
    """Return how many connections this process has accepted at a port, and not closed."""
    found = psutil.Process().net_connections("tcp")
    return sum(c.laddr.port == port and c.status != psutil.CONN_LISTEN for c in found)


async def test_over_http_a_reader_that_stops_reading_loses_stream_and_connection(
    tiny_model: Path, state: State
):
    limits, http = {"max_unread_characters": UNREAD}, {"port": 0, "stuck_timeout_s": 1.0}
    body = b'{"prompt": "endless", "stream": true, "guidance": {"num_candidates": 1}}'
    async with running(tiny_model, state, make_engine=wordy, limits=limits, http=http) as server:
        port, loop = server.application.http_port, asyncio.get_running_loop()
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.setblocking(False)
            await loop.sock_connect(reader, ("127.0.0.1", port))
            await loop.sock_sendall(reader, head_of(len(body)) + body)
            assert b" 200 " in await loop.sock_recv(reader, 64)
            assert server.application._lifecycle.in_flight == 1
            await until(lambda: server.engine.said and not server.engine.streaming)
            await until(lambda: server.application._lifecycle.in_flight == 0, 5)
            await until(lambda: connections(port) == 0, 10)


async def test_a_reader_that_keeps_up_hears_more_than_the_limit(server: Running):
    call, heard = server.policy.StreamGenerate(ENDLESS), 0
    while heard < 4 * UNREAD:
        heard += len((await call.read()).text_delta)
    call.cancel()
    await until(lambda: not server.engine.streaming, 1)


async def test_a_reply_that_comes_at_once_may_be_longer_than_the_limit(
    tiny_model: Path, state: State
):
    limits = {"max_unread_characters": 16}
    async with running(tiny_model, state, make_engine=wordy, limits=limits) as server:
        stream = server.policy.StreamGenerate(ALL_OF_IT)
        *deltas, last = [event async for event in stream]
        assert "".join(event.text_delta for event in deltas) == last.response.text
        assert len(last.response.text) >= len(WORD)
