"""Spans of one request and of what is said of its reply; they quote nobody unless content is wanted."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode, TracerProvider
from opentelemetry.trace import format_trace_id as trace_id_of
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from server.calls import TRACE_HEADERS
from server.telemetry import attributes
from thumbloop import __version__, logs
from thumbloop.config.tracing import Tracing
from thumbloop.types import Feedback, Interaction, Preference
from thumbloop.v1 import policy_pb2

_PROPAGATOR = TraceContextTextMapPropagator()
Attributes = Mapping[str, AttributeValue]


class Traces:
    """Makes spans, and remembers those of the latest replies for the feedback that comes to them."""

    def __init__(self, provider: TracerProvider, settings: Tracing) -> None:
        self._tracer = provider.get_tracer("thumbloop", __version__)
        self._has_content = settings.content
        self._max_known = settings.known_replies
        self._known: OrderedDict[str, SpanContext] = OrderedDict()

    @contextmanager
    def reply(self, message: policy_pb2.GenerateRequest) -> Iterator[Span]:
        """Trace the answer to a request, as a part of the caller's trace if there is one."""
        asked = attributes.of_request(message)
        name = attributes.name_of(asked)
        with self.span(name, asked, SpanKind.SERVER, _callers()) as span:
            if span.is_recording():
                logs.note(trace_id=trace_id_of(span.get_span_context().trace_id))
            yield span

    def replied(self, span: Span, reply: Interaction) -> None:
        """Say what became of a request."""
        if not span.is_recording():
            return
        span.set_attributes(attributes.of_reply(reply))
        if self._has_content:
            span.set_attributes(attributes.of_content(reply))
        self._known[reply.response_id] = span.get_span_context()
        if len(self._known) > self._max_known:
            self._known.popitem(last=False)

    def rated(self, thumb: Feedback, comment: str) -> None:
        """Tell of a thumb that was stored."""
        said = attributes.of_thumb(thumb, comment if self._has_content else "")
        self._evaluated(thumb.response_id, said)

    def compared(self, preference: Preference) -> None:
        """Tell of a preference that was stored."""
        self._evaluated(preference.response_id, attributes.of_preference(preference))

    def _evaluated(self, response_id: str, said: Attributes) -> None:
        """Export a span with the event of an evaluation, linked to the reply's span while that is known."""
        reply = self._known.get(response_id)
        span = self._tracer.start_span(
            "feedback",
            _callers(),
            SpanKind.SERVER,
            attributes={attributes.RESPONSE_ID: response_id},
            links=[] if reply is None else [Link(reply)],
        )
        span.add_event(attributes.EVALUATION, said)
        span.end()

    @contextmanager
    def span(
        self,
        name: str,
        given: Attributes,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: Context | None = None,
    ) -> Iterator[Span]:
        """Time the block; how it failed is told by the error's kind alone."""
        with self._tracer.start_as_current_span(
            name,
            parent,
            kind,
            given,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                failed(span, error)
                raise

    def begin(self, name: str, given: Attributes, start_ns: int | None = None) -> Span:
        """Begin a span that somebody else ends."""
        return self._tracer.start_span(name, attributes=given, start_time=start_ns)


def failed(span: Span, error: BaseException) -> None:
    """Say by which kind of error a span ended; what is cancelled has not failed."""
    span.set_attribute("error.type", type(error).__name__)
    if not isinstance(error, asyncio.CancelledError):
        span.set_status(StatusCode.ERROR)


def _callers() -> Context:
    """Return the caller's trace context, empty where it sent none."""
    return _PROPAGATOR.extract(TRACE_HEADERS.get(), Context())
