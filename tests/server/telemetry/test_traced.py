"""Spans end with what they time, however carelessly it is driven."""

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.guidance import Choice, Outcome
from server.telemetry.traced import TracedGuidance
from server.telemetry.traces import Traces
from thumbloop.config.tracing import Tracing


class Careless:
    """A strategy that leaves what it has begun."""

    name = "careless"

    async def run(self, worker: Any, choice: Choice, rng: Random) -> Outcome:
        worker.begin(0)
        worker.begin(1)
        raise RuntimeError("and goes")


async def test_what_a_strategy_leaves_behind_is_ended():
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    decoding = SimpleNamespace(until=None)
    worker = SimpleNamespace(begin=lambda _index: decoding, show=None)
    guidance = TracedGuidance(Traces(provider, Tracing()), Careless())
    with pytest.raises(RuntimeError, match="and goes"):
        await guidance.run(worker, Choice(2, 1.0, 0.0), Random(0))
    assert [span.name for span in exporter.get_finished_spans()] == ["sample", "sample"]
