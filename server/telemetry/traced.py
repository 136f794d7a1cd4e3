"""What answers, with spans around it: each does what the one inside does, and times it."""

import time
from collections.abc import Awaitable, Callable
from random import Random

from opentelemetry.trace import Span

from server.access import Caller
from server.guidance import Choice, Guidance, Outcome
from server.guidance.outcome import Decoding, Worker
from server.reception import Answering, Reader
from server.telemetry.attributes import of_candidate, of_choice
from server.telemetry.traces import Traces, failed
from server.telemetry.unwatched import Log
from thumbloop.types import Candidate, Interaction
from thumbloop.v1 import policy_pb2

_INDEX = "thumbloop.candidate.index"


class TracedReception:
    """A span for each call for a reply: the root of all others of it; see Reception."""

    def __init__(self, traces: Traces, inner: Answering) -> None:
        self._traces = traces
        self._inner = inner

    async def respond(
        self,
        message: policy_pb2.GenerateRequest,
        caller: Caller,
        *,
        time_left_s: float | None = None,
    ) -> Interaction:
        """Return the reply."""
        with self._traces.reply(message) as span:
            reply = await self._inner.respond(message, caller, time_left_s=time_left_s)
            self._traces.replied(span, reply)
            return reply

    async def tell(
        self,
        message: policy_pb2.GenerateRequest,
        caller: Caller,
        reader: Reader,
        *,
        time_left_s: float | None = None,
    ) -> None:
        """Let somebody read the reply as it grows."""
        with self._traces.reply(message) as span:
            watched = _Reader(reader, lambda reply: self._traces.replied(span, reply))
            await self._inner.tell(message, caller, watched, time_left_s=time_left_s)


class _Reader:
    """A reader, and whoever wants the whole reply, too."""

    def __init__(self, inner: Reader, on_end: Callable[[Interaction], None]) -> None:
        self._on_end = on_end
        self._inner = inner
        self.begin, self.write = inner.begin, inner.write

    async def end(self, reply: Interaction) -> None:
        self._on_end(reply)
        await self._inner.end(reply)


class TracedGuidance:
    """Spans for each candidate that is sampled and scored, and for the choice; see Guidance."""

    def __init__(self, traces: Traces, inner: Guidance) -> None:
        self.name = inner.name
        self._traces = traces
        self._inner = inner

    async def run(self, worker: Worker, choice: Choice, rng: Random) -> Outcome:
        """Return all candidates with the chosen one marked."""
        watched = _Worker(self._traces, worker)
        try:
            outcome = await self._inner.run(watched, choice, rng)
        finally:
            watched.close()
        said = of_choice(self.name, outcome)
        self._traces.begin("choose", said, watched.idle_since_ns).end()
        return outcome


class _Worker:
    """A worker whose samples and scores are spans."""

    def __init__(self, traces: Traces, inner: Worker) -> None:
        self._traces = traces
        self._inner = inner
        self._decodings: list[_Decoding] = []
        self.idle_since_ns = time.time_ns()
        self.show = inner.show

    @property
    def can_score(self) -> bool:
        return self._inner.can_score

    async def sample(self, index: int, *, is_urgent: bool = True) -> Candidate:
        with self._traces.span("sample", {_INDEX: index}) as span:
            candidate = await self._inner.sample(index, is_urgent=is_urgent)
            span.set_attributes(of_candidate(candidate))
        self.idle_since_ns = time.time_ns()
        return candidate

    def begin(self, index: int) -> Decoding:
        span = self._traces.begin("sample", {_INDEX: index})
        self._decodings.append(_Decoding(span, self._inner.begin(index)))
        return self._decodings[-1]

    async def score(self, candidate: Candidate, *, is_urgent: bool = True) -> Candidate:
        said = {_INDEX: candidate.index, "thumbloop.tokens": len(candidate.token_ids)}
        with self._traces.span("score", said) as span:
            scored = await self._inner.score(candidate, is_urgent=is_urgent)
            if scored.reward is not None:
                span.set_attribute("thumbloop.reward", scored.reward)
        self.idle_since_ns = time.time_ns()
        return scored

    def close(self) -> None:
        """End the spans of what nobody waited for to its end."""
        for decoding in self._decodings:
            decoding.close()


class _Decoding:
    """A decoding whose span ends with it."""

    def __init__(self, span: Span, inner: Decoding) -> None:
        self._span = span
        self._inner = inner
        self.until = inner.until

    async def finish(self) -> Candidate:
        try:
            return self._ended(await self._inner.finish())
        except Exception as error:
            failed(self._span, error)
            raise

    async def abort(self) -> Candidate:
        return self._ended(await self._inner.abort())

    def close(self) -> None:
        if self._span.is_recording():
            self._span.end()

    def _ended(self, candidate: Candidate) -> Candidate:
        if self._span.is_recording():
            self._span.set_attributes(of_candidate(candidate))
        self.close()
        return candidate


def traced_log(traces: Traces, log: Log) -> Log:
    """Return what takes a row as `log` does; the span lasts until it is durable."""

    async def durable(written: Awaitable[None]) -> None:
        with traces.span("store", {}):
            await written

    return lambda interaction: durable(log(interaction))
