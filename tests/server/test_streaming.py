"""StreamGenerate over the wire: text as soon as it is certain, and nothing that is taken back."""

import asyncio
import math
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from server.engine import Sampled
from tests.fakes import FakeEngine
from tests.publishing import publisher_of
from tests.refusals import detail_of, fields, refused
from tests.serving import Running, running, until
from thumbloop.config import State
from thumbloop.errors import EngineUnavailable
from thumbloop.rendering import TextStream
from thumbloop.store import interactions
from thumbloop.types import Status
from thumbloop.v1 import policy_pb2

STRATEGIES = ["none", "best_of_n", "soft_best_of_n", "speculative_rejection"]
ALONE = {"guidance": policy_pb2.GuidanceParams(num_candidates=1)}
PRUNED = {
    "guidance": policy_pb2.GuidanceParams(num_candidates=2, strategy_name="speculative_rejection"),
    "sampling": policy_pb2.SamplingParams(max_tokens=40, seed=3),
}


class GatedEngine(FakeEngine):
    """Streams wait at each token until the test lets them have so many; then they may fail."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.may_have = math.inf
        self.longest = 0
        self.error: Exception | None = None
        self.script: list[int] = []  # tokens that every reply consists of

    async def stream(self, *arguments: Any, **more: Any) -> AsyncGenerator[Sampled, None]:
        async for sampled in super().stream(*arguments, **more):
            while len(sampled.token_ids) > self.may_have:
                await asyncio.sleep(0.001)
                if self.error is not None:
                    raise self.error
            self.longest = max(self.longest, len(sampled.token_ids))
            yield sampled

    def _draw(self, weights: str, prompt: Any, seed: object, index: int) -> int:
        if not self.script:
            return super()._draw(weights, prompt, seed, index)
        return self.script[index] if index < len(self.script) else self.tokenizer.eos_token_id


@pytest.fixture
async def server(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A server with a reward model, whose choices are never audits."""

    def make(model: Path, _config: object) -> FakeEngine:
        return GatedEngine(model)

    guidance = {"audit_share": 0.0}
    async with running(tiny_model, state, make_engine=make, guidance=guidance) as server:
        publisher_of(server, tiny_model, state).publish(1)
        await server.serves(1)
        yield server
        server.engine.may_have = math.inf


class Stream:
    """A stream under way."""

    def __init__(self, server: Running, text: str = "hello", **fields: Any) -> None:
        request = policy_pb2.GenerateRequest(text=text, **fields)
        self.call = server.policy.StreamGenerate(policy_pb2.StreamGenerateRequest(request=request))
        self.pieces: list[str] = []
        self.reply: policy_pb2.GenerateResponse | None = None
        self._next: asyncio.Future[Any] | None = None

    def next(self) -> "asyncio.Future[Any]":
        """Return the next event, which is on its way."""
        if self._next is None:
            self._next = asyncio.ensure_future(self.call.read())
        return self._next

    async def hear(self) -> str:
        """Return the next piece of text."""
        event, self._next = await asyncio.wait_for(self.next(), 10), None
        assert event is not grpc.aio.EOF
        if event.WhichOneof("event") == "response":
            self.reply = event.response
            assert await self.call.read() is grpc.aio.EOF
            return ""
        assert event.text_delta
        self.pieces.append(event.text_delta)
        return event.text_delta

    async def rest(self) -> policy_pb2.GenerateResponse:
        while self.reply is None:
            await self.hear()
        return self.reply

    @property
    def text(self) -> str:
        return "".join(self.pieces)


async def is_silent(stream: Stream) -> bool:
    """Say whether nothing is heard for a while."""
    await asyncio.wait((stream.next(),), timeout=0.1)
    return not stream.next().done()


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_pieces_are_the_reply_that_generate_gives(server: Running, strategy: str):
    for seed in range(6):
        fields: dict[str, Any] = {
            "sampling": policy_pb2.SamplingParams(seed=seed),
            "guidance": policy_pb2.GuidanceParams(num_candidates=3, strategy_name=strategy),
            "include_candidates": True,
        }
        stream = Stream(server, **fields)
        reply, whole = await stream.rest(), await server.generate("hello", **fields)
        assert stream.text == reply.text == whole.text
        assert reply.candidates == whole.candidates
        assert len(reply.candidates) == (1 if strategy == "none" else 3)
        assert (reply.reward, reply.policy_version) == (whole.reward, whole.policy_version)
        assert server.stored(reply.response_id).chosen.text == reply.text
        assert (await server.client.rate(reply.response_id, up=True)).policy_version == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_one_candidate_is_heard_token_by_token(server: Running, strategy: str):
    server.engine.script = server.engine.tokenizer.encode("xyzxyzxyz")
    server.engine.may_have = 1
    guidance = policy_pb2.GuidanceParams(num_candidates=1, strategy_name=strategy)
    stream = Stream(server, guidance=guidance)
    for letter in "xyzxy":
        assert await stream.hear() == letter
        server.engine.may_have += 1
    assert server.engine.longest <= 6
    server.engine.may_have = math.inf
    assert (await stream.rest()).text == stream.text == "xyzxyzxyz"
    assert server.engine.streaming == 0


@pytest.mark.parametrize("strategy", ["best_of_n", "soft_best_of_n"])
async def test_of_several_nothing_is_heard_before_one_is_chosen(server: Running, strategy: str):
    server.engine.may_sample.clear()
    guidance = policy_pb2.GuidanceParams(num_candidates=3, strategy_name=strategy)
    stream = Stream(server, guidance=guidance)
    await server.sampling(3)
    assert await is_silent(stream)
    server.engine.may_sample.set()
    assert (await stream.rest()).text == stream.text


async def test_speculative_rejection_is_heard_once_one_candidate_is_left(server: Running):
    checkpoint = 12  # tokens: 0.3 of the 40 there may be
    server.engine.script = [server.engine.tokenizer.encode(c)[0] for c in "ab" * 20]
    server.engine.may_have = checkpoint - 1
    stream = Stream(server, **PRUNED)
    await until(lambda: server.engine.longest == checkpoint - 1)
    assert await is_silent(stream)
    assert server.engine.streaming == 2
    server.engine.may_have = checkpoint
    first = await stream.hear()
    assert first.startswith("ab")
    assert len(first) <= checkpoint
    await until(lambda: server.engine.streaming == 1)
    server.engine.may_have = math.inf
    reply = await stream.rest()
    assert stream.text == reply.text == "ab" * 20
    assert (reply.num_candidates, reply.reranked) == (2, True)


@pytest.mark.parametrize("how", ["none", "speculative_rejection"])
async def test_stops_are_never_heard_not_even_in_part(server: Running, how: str):
    heard = 0
    for seed in range(40):
        sampling = {"seed": seed, "max_tokens": 30}
        guidance = policy_pb2.GuidanceParams(num_candidates=2, strategy_name=how)
        free = await server.generate(
            "hello", sampling=policy_pb2.SamplingParams(**sampling), guidance=guidance
        )
        if len(free.text) < 8:
            continue
        stop = [free.text[3:6], free.text[4:8] + "§", "never"]
        stopped = policy_pb2.SamplingParams(**sampling, stop=stop)
        stream = Stream(server, sampling=stopped, guidance=guidance)
        reply = await stream.rest()
        assert stream.text == reply.text
        assert not any(text in reply.text for text in stop)
        heard += len(reply.text) == 3
    assert heard >= 5


async def test_what_looks_like_the_beginning_of_a_stop_is_held_back(server: Running):
    server.engine.script = server.engine.tokenizer.encode("xyzxyq")
    server.engine.may_have = 5
    stream = Stream(server, **ALONE, sampling=policy_pb2.SamplingParams(stop=["yzz", "xyq"]))
    while stream.text != "xyz":
        await stream.hear()
    await until(lambda: server.engine.longest == 5)
    assert await is_silent(stream)  # "xy" may begin a stop
    server.engine.may_have = math.inf
    assert (await stream.rest()).text == stream.text == "xyz"


async def test_characters_of_several_tokens_are_heard_whole(server: Running):
    text = "naïve 😀 日本 é"
    server.engine.script = server.engine.tokenizer.encode(text)
    assert len(server.engine.script) > len(text)
    sampling = policy_pb2.SamplingParams(max_tokens=40)
    server.engine.may_have = 0
    stream = Stream(server, **ALONE, sampling=sampling)
    certain = TextStream(server.engine.tokenizer)
    for n in range(1, len(server.engine.script) + 1):  # a token only when the last one was heard
        server.engine.may_have = n
        if certain.read(server.engine.script[:n]) != stream.text:
            await stream.hear()
        assert stream.text == certain.read(server.engine.script[:n])
    server.engine.may_have = math.inf
    assert (await stream.rest()).text == text
    assert stream.text == text
    assert len(stream.pieces) > 5
    assert not any("\ufffd" in piece for piece in stream.pieces)


async def test_bytes_that_are_no_character_are_the_same_in_pieces_and_in_the_reply(server: Running):
    server.engine.script = [*server.engine.tokenizer.encode("a😀")[:3], 70]
    stream = Stream(server, **ALONE)
    assert (await stream.rest()).text == stream.text
    server.engine.script = server.engine.tokenizer.encode("a😀")[:3]
    stream = Stream(server, **ALONE)
    assert (await stream.rest()).text == stream.text
    assert stream.text.startswith("a\ufffd")


async def test_an_empty_reply_has_no_pieces(server: Running):
    server.engine.script = [server.engine.tokenizer.eos_token_id]
    stream = Stream(server, **ALONE)
    assert (await stream.rest()).text == ""
    assert stream.pieces == []


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (EngineUnavailable("the engine stopped"), grpc.StatusCode.UNAVAILABLE, "stopped"),
        (RuntimeError("a secret"), grpc.StatusCode.INTERNAL, "internal error; the server's log"),
    ],
)
async def test_an_error_in_the_middle_has_its_status(
    server: Running, error: Exception, code: grpc.StatusCode, words: str
):
    server.engine.script = server.engine.tokenizer.encode("xyz")
    server.engine.may_have = 1
    stream = Stream(server, **ALONE)
    assert await stream.hear() == "x"
    server.engine.error = error
    failed = await refused(stream.rest())
    assert failed.code() is code
    assert words in failed.details()
    assert "secret" not in failed.details()
    assert server.engine.streaming == 0


async def test_a_refusal_before_the_first_text_has_its_details(server: Running):
    server.engine.is_full = True
    for how in (ALONE, {}):
        failed = await refused(Stream(server, **how).rest())
        assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        retry = detail_of(failed, error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToMilliseconds() == 250
    assert fields(await refused(Stream(server, "").rest())) == ["text"]
    nothing = server.policy.StreamGenerate(policy_pb2.StreamGenerateRequest())
    assert fields(await refused(nothing.read())) == ["prompt"]


async def test_text_whose_row_cannot_be_written_does_not_become_a_reply(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_arguments: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("disk full"))

    monkeypatch.setattr(interactions, "append", fail)
    stream = Stream(server)
    failed = await refused(stream.rest())
    assert failed.code() is grpc.StatusCode.UNAVAILABLE
    assert "disk full" in failed.details()
    assert stream.reply is None


@pytest.mark.parametrize("how", [ALONE, PRUNED, {}], ids=["alone", "pruned", "several"])
async def test_cancelling_a_stream_aborts_its_samples(server: Running, how: dict[str, Any]):
    started = server.engine.started
    server.engine.may_have = 2
    if not how:
        server.engine.may_sample.clear()
    stream = Stream(server, **how)
    await until(lambda: server.engine.started > started)
    if how is ALONE:
        await stream.hear()
    stream.call.cancel()
    await until(lambda: not any(server.engine._in_use.values()), 1)
    assert server.engine.streaming == 0
    await until(lambda: server.application._lifecycle.in_flight == 0, 1)
    assert server.application._admission.candidates == 0
    server.engine.may_sample.set()
    server.engine.may_have = math.inf
    with_row = await Stream(server, request_id="after").rest()
    assert server.stored(with_row.response_id).status is Status.COMPLETED


async def first_texts(server: Running) -> dict[str, tuple[float, float]]:
    """Return, by strategy, how many first texts were timed, and their seconds together."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(await scrape(server)):
        if family.name == "thumbloop_time_to_first_text_seconds":
            for sample in family.samples:
                kind = sample.name.rpartition("_")[2]
                found.setdefault(sample.labels["strategy"], {})[kind] = sample.value
    return {strategy: (values["count"], values["sum"]) for strategy, values in found.items()}


async def scrape(server: Running) -> str:
    url = f"http://127.0.0.1:{server.application.metrics_port}/metrics"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()

    return await asyncio.to_thread(read)


async def test_the_time_to_the_first_text_is_measured_by_strategy(server: Running):
    server.engine.script = server.engine.tokenizer.encode("xyz")
    server.engine.may_have = 0
    slow = Stream(server, guidance=policy_pb2.GuidanceParams(strategy_name="none"))
    await until(lambda: server.engine.streaming == 1)
    await asyncio.sleep(0.2)
    server.engine.may_have = 1
    await slow.hear()
    await asyncio.sleep(0.3)  # what comes after the first text does not count
    server.engine.may_have = math.inf
    await slow.rest()
    for strategy in STRATEGIES[1:]:
        guidance = policy_pb2.GuidanceParams(strategy_name=strategy)
        await Stream(server, guidance=guidance).rest()
        await server.generate("not streamed", guidance=guidance)
    timed = await first_texts(server)
    assert {strategy: count for strategy, (count, _) in timed.items()} == dict.fromkeys(
        STRATEGIES, 1
    )
    assert 0.2 <= timed["none"][1] < 0.45
    server.engine.script = [server.engine.tokenizer.eos_token_id]
    await Stream(server, guidance=policy_pb2.GuidanceParams(strategy_name="none")).rest()
    assert (await first_texts(server))["none"] == timed["none"]  # it said nothing


async def test_the_first_text_of_a_stream_that_is_given_up_counts_too(server: Running):
    server.engine.script = server.engine.tokenizer.encode("xyz")
    server.engine.may_have = 1
    stream = Stream(server, guidance=policy_pb2.GuidanceParams(strategy_name="none"))
    await stream.hear()
    stream.call.cancel()
    await until(lambda: server.application._lifecycle.in_flight == 0)
    assert (await first_texts(server))["none"][0] == 1
