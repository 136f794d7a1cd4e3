"""One trace for each request, from the call to the row, and the thumb that comes later."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from server.telemetry import exporting
from server.telemetry.watching import watch
from tests.fakes import FakeEngine
from tests.over_http import web
from tests.publishing import Publisher
from tests.refusals import refused
from tests.server.telemetry.receiver import receiving
from tests.serving import Running, running, until
from thumbloop.config import State
from thumbloop.config.tracing import Tracing
from thumbloop.errors import EngineUnavailable, SettingsError
from thumbloop.v1 import policy_pb2

CANARY = "zebra-umbrella"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
ROOT = Path(__file__).parents[3]
ON = {"enabled": True}
TWO = policy_pb2.GuidanceParams(num_candidates=2)


class Spans:
    """What was exported, to be read when the server has stopped."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    @property
    def all(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(exporting, "_exporter_of", lambda _settings: exporter)
    return Spans(exporter)


@asynccontextmanager
async def traced(model: Path, state: State, **tracing: Any) -> AsyncIterator[Running]:
    async with running(model, state, tracing=ON | tracing) as server:
        yield server


async def test_a_request_is_one_trace_from_the_call_to_the_row(
    tiny_model: Path, state: State, publisher: Publisher, spans: Spans
):
    publisher.publish(1)
    async with traced(tiny_model, state) as server:
        await server.serves(1)
        reply = await server.generate("hello", guidance=TWO)
        row = server.stored(reply.response_id)
    assert len({span.context.trace_id for span in spans.all}) == 1
    root = spans.one("text_completion default")
    names = ["sample", "sample", "score", "score", "choose", "store"]
    children = [span for span in spans.all if span is not root]
    assert sorted(span.name for span in children) == sorted(names)
    assert {span.parent.span_id for span in children} == {root.context.span_id}
    assert root.parent is None
    said = dict(root.attributes)
    assert said["gen_ai.operation.name"] == "text_completion"
    assert said["gen_ai.request.model"] == "default"
    assert said["gen_ai.response.id"] == reply.response_id
    assert said["gen_ai.usage.input_tokens"] == reply.usage.prompt_tokens
    assert said["gen_ai.usage.output_tokens"] == reply.usage.reply_tokens
    assert said["gen_ai.response.finish_reasons"] in (("stop",), ("length",))
    assert said["thumbloop.policy_version"] == 1
    choice = dict(spans.one("choose").attributes)
    chosen = row.chosen
    assert choice["thumbloop.candidate.index"] == chosen.index
    assert choice["thumbloop.reward"] == chosen.reward
    assert choice["thumbloop.propensity"] == chosen.propensity
    assert choice["thumbloop.guidance.strategy"] == "soft_best_of_n"
    for name in ("sample", "score"):
        assert {s.attributes["thumbloop.candidate.index"] for s in spans.named(name)} == {0, 1}


async def test_the_spans_follow_each_other(tiny_model: Path, state: State, spans: Spans):
    async with traced(tiny_model, state) as server:
        await server.generate("hello", guidance=TWO)
    root, choice, store = (spans.one(n) for n in ("text_completion default", "choose", "store"))
    sampled = max(span.end_time for span in spans.named("sample"))
    assert root.start_time < sampled <= choice.start_time <= choice.end_time
    assert choice.end_time <= store.start_time <= store.end_time <= root.end_time


@pytest.mark.parametrize(
    "strategy", ["none", "best_of_n", "soft_best_of_n", "speculative_rejection"]
)
async def test_every_strategy_is_traced(
    tiny_model: Path, state: State, publisher: Publisher, spans: Spans, strategy: str
):
    publisher.publish(1)
    async with traced(tiny_model, state) as server:
        await server.serves(1)
        value = policy_pb2.GuidanceStrategy.Value(f"GUIDANCE_STRATEGY_{strategy.upper()}")
        guidance = policy_pb2.GuidanceParams(strategy=value, num_candidates=3)
        reply = await server.generate("hello", guidance=guidance)
    assert spans.one("choose").attributes["thumbloop.guidance.strategy"] == strategy
    assert len(spans.named("sample")) == reply.num_candidates
    root = spans.one("text_completion default")
    assert {s.parent.span_id for s in spans.all if s is not root} == {root.context.span_id}


async def test_a_stream_and_http_are_traced_as_any_call(
    tiny_model: Path, state: State, spans: Spans
):
    async with traced(tiny_model, state) as server, web(server) as http:
        pieces = [piece async for piece in server.client.stream("hello")]
        assert pieces
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        headers = {"traceparent": TRACEPARENT}
        for stream in (False, True):
            answer = await http.post(
                "/v1/chat/completions", json=chat | {"stream": stream}, headers=headers
            )
            assert answer.status_code == 200
    first, *others = spans.named("chat default")
    assert len(others) == 2
    assert "gen_ai.response.id" in first.attributes
    for span in others:
        assert f"{span.context.trace_id:032x}" == TRACE
        assert "gen_ai.response.id" in span.attributes
    assert len(spans.named("store")) == 3


async def test_a_callers_trace_goes_on(tiny_model: Path, state: State, spans: Spans):
    async with traced(tiny_model, state) as server:
        request = policy_pb2.GenerateRequest(text="hello", guidance=TWO)
        await server.policy.Generate(request, metadata=[("traceparent", TRACEPARENT)])
        await server.policy.Generate(request)
        unsampled = f"00-{'1' * 32}-{PARENT}-00"
        await server.policy.Generate(request, metadata=[("traceparent", unsampled)])
        await server.policy.Generate(request, metadata=[("traceparent", "nonsense")])
    continued, alone, odd = spans.named("text_completion default")
    assert f"{continued.context.trace_id:032x}" == TRACE
    assert f"{continued.parent.span_id:016x}" == PARENT
    assert alone.parent is None
    assert odd.parent is None


async def test_a_cancelled_call_ends_its_spans(tiny_model: Path, state: State, spans: Spans):
    async with traced(tiny_model, state) as server:
        server.engine.may_sample.clear()
        call = server.policy.Generate(policy_pb2.GenerateRequest(text="hello", guidance=TWO))
        await server.sampling(2)
        call.cancel()
        await until(lambda: server.engine.aborted == 2)
        server.engine.may_sample.set()
    for span in [spans.one("text_completion default"), *spans.named("sample")]:
        assert span.attributes["error.type"] == "CancelledError"
        assert span.status.status_code is StatusCode.UNSET
    assert len(spans.named("sample")) == 2
    assert spans.named("store"), "the row that says so"


async def test_a_cancelled_race_ends_its_spans(
    tiny_model: Path, state: State, publisher: Publisher, spans: Spans
):
    publisher.publish(1)
    async with traced(tiny_model, state) as server:
        await server.serves(1)
        server.engine.may_sample.clear()
        value = policy_pb2.GuidanceStrategy.GUIDANCE_STRATEGY_SPECULATIVE_REJECTION
        guidance = policy_pb2.GuidanceParams(strategy=value, num_candidates=3)
        call = server.policy.Generate(policy_pb2.GenerateRequest(text="hello", guidance=guidance))
        await server.sampling(3)
        call.cancel()
        await until(lambda: server.engine.aborted == 3)
        server.engine.may_sample.set()
    assert len(spans.named("sample")) == 3
    assert spans.named("choose") == []


async def test_a_race_that_fails_ends_its_spans(
    tiny_model: Path,
    state: State,
    publisher: Publisher,
    spans: Spans,
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(*_arguments: Any) -> None:
        raise EngineUnavailable("the engine stopped")

    publisher.publish(1)
    async with traced(tiny_model, state) as server:
        await server.serves(1)
        monkeypatch.setattr(FakeEngine, "speak", fail)
        value = policy_pb2.GuidanceStrategy.GUIDANCE_STRATEGY_SPECULATIVE_REJECTION
        guidance = policy_pb2.GuidanceParams(strategy=value, num_candidates=3)
        request = policy_pb2.GenerateRequest(text="hello", guidance=guidance)
        await refused(server.policy.Generate(request))
    assert len(spans.named("sample")) == 3


async def test_a_failure_is_told_by_its_kind_alone(
    tiny_model: Path, state: State, spans: Spans, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_arguments: Any) -> None:
        raise EngineUnavailable(CANARY)

    async with traced(tiny_model, state) as server:
        monkeypatch.setattr(FakeEngine, "speak", fail)
        await refused(server.policy.Generate(policy_pb2.GenerateRequest(text="hello")))
    root = spans.one("text_completion default")
    assert root.attributes["error.type"] == "EngineUnavailable"
    assert root.status.status_code is StatusCode.ERROR
    assert CANARY not in "".join(span.to_json() for span in spans.all)


async def use(server: Running) -> str:
    """Say things that nobody should read, and rate the reply."""
    reply = await server.generate(f"is {CANARY} good?", user_id=CANARY, session_id=CANARY)
    await server.client.rate(reply.response_id, up=False, user_id=CANARY, comment=CANARY)
    return reply.response_id


async def test_spans_quote_nobody(tiny_model: Path, state: State, spans: Spans):
    async with traced(tiny_model, state) as server:
        response_id = await use(server)
        text = server.stored(response_id).chosen.text
    written = "".join(span.to_json() for span in spans.all)
    assert CANARY not in written
    assert f'"{text}' not in written


async def test_spans_hold_what_was_said_where_that_is_wanted(
    tiny_model: Path, state: State, spans: Spans
):
    async with traced(tiny_model, state, content=True) as server:
        response_id = await use(server)
        text = server.stored(response_id).chosen.text
    said = spans.one("text_completion default").attributes
    (asked,) = json.loads(said["gen_ai.input.messages"])
    (answered,) = json.loads(said["gen_ai.output.messages"])
    assert asked["parts"] == [{"type": "text", "content": f"is {CANARY} good?"}]
    assert answered["parts"] == [{"type": "text", "content": text}]
    (event,) = spans.one("feedback").events
    assert event.attributes["gen_ai.evaluation.explanation"] == CANARY


async def test_a_thumb_is_an_evaluation_linked_to_its_reply(
    tiny_model: Path, state: State, spans: Spans
):
    async with traced(tiny_model, state) as server:
        reply = await server.generate("hello")
        for _ in range(2):  # the second is the same again
            await server.client.rate(reply.response_id, up=True, request_id="once")
    span, root = spans.one("feedback"), spans.one("text_completion default")
    (link,) = span.links
    assert link.context.span_id == root.context.span_id
    (event,) = span.events
    assert event.name == "gen_ai.evaluation.result"
    assert dict(event.attributes) == {
        "gen_ai.response.id": reply.response_id,
        "gen_ai.evaluation.name": "thumb",
        "gen_ai.evaluation.score.value": 1.0,
        "gen_ai.evaluation.score.label": "up",
        "thumbloop.policy_version": 0,
    }


async def test_a_preference_is_an_evaluation_too(tiny_model: Path, state: State, spans: Spans):
    async with traced(tiny_model, state) as server:
        reply = await server.generate("hello", guidance=TWO, include_candidates=True)
        await server.client.prefer(reply.response_id, better=1, worse=0)
    (event,) = spans.one("feedback").events
    assert event.attributes["gen_ai.evaluation.name"] == "preference"
    assert event.attributes["gen_ai.evaluation.score.label"] == "1 over 0"


async def test_a_reply_that_is_forgotten_is_linked_by_its_id_alone(
    tiny_model: Path, state: State, spans: Spans
):
    async with traced(tiny_model, state, known_replies=1) as server:
        first = await server.generate("hello")
        second = await server.generate("hello")
        for reply in (first, second):
            await server.client.rate(reply.response_id, up=True)
    old, new = spans.named("feedback")
    assert old.links == ()
    assert old.events[0].attributes["gen_ai.response.id"] == first.response_id
    assert len(new.links) == 1


async def test_a_share_of_traces_is_kept(tiny_model: Path, state: State, spans: Spans):
    async with traced(tiny_model, state, sample_ratio=0.0) as server:
        await use(server)
    assert spans.all == ()


async def test_a_receiver_gets_whole_traces(tiny_model: Path, state: State):
    with receiving() as (receiver, endpoint):
        async with traced(tiny_model, state, endpoint=endpoint) as server:
            await server.generate("hello", guidance=TWO)
        names = [span.name for span in receiver.spans]
        expected = ["choose", "sample", "sample", "store", "text_completion default"]
        assert sorted(names) == expected
        assert receiver.services == {"thumbloop-server"}
        assert len({span.trace_id for span in receiver.spans}) == 1


async def test_nobody_waits_for_a_receiver_that_is_not_there(tiny_model: Path, state: State):
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, and says nothing
        endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        tracing = {"endpoint": endpoint, "flush_timeout_s": 0.5}
        async with traced(tiny_model, state, **tracing) as server:
            replies = await asyncio.gather(*(server.generate("hello") for _ in range(50)))
            assert all(reply.text for reply in replies)
            began = time.monotonic()
        assert time.monotonic() - began < 10


async def test_an_exporter_that_fails_disturbs_nobody(tiny_model: Path, state: State):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"  # where nobody listens any more
    async with traced(tiny_model, state, endpoint=endpoint, flush_timeout_s=0.2) as server:
        assert (await server.generate("hello")).text


def test_without_traces_opentelemetry_is_not_imported():
    code = (
        "import sys, server.application, server.telemetry.watching\n"
        "from thumbloop.config.tracing import Tracing\n"
        "server.telemetry.watching.watch(Tracing())\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=ROOT, text=True).strip() == "[]"


def test_traces_without_the_library_are_refused(monkeypatch: pytest.MonkeyPatch):
    for name in [n for n in sys.modules if n.startswith("server.telemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(SettingsError, match=r"thumbloop\[tracing\]"):
        watch(Tracing(enabled=True))
