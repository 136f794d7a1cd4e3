"""All that is watched of a server, by one object."""

from collections.abc import Mapping

from opentelemetry.sdk.trace.export import SpanExporter

from server.guidance import Guidance
from server.reception import Answering
from server.telemetry.exporting import Exporting
from server.telemetry.traced import TracedGuidance, TracedReception, traced_log
from server.telemetry.traces import Traces
from server.telemetry.unwatched import Log, Unwatched
from thumbloop.config.tracing import Tracing


class Watched(Unwatched):
    """Puts spans around what answers, and exports them."""

    def __init__(self, settings: Tracing, exporter: SpanExporter | None = None) -> None:
        self._exporting = Exporting(settings, exporter)
        self._traces = Traces(self._exporting.provider, settings)
        self.listener = self._traces

    def reception(self, reception: Answering) -> Answering:
        """Return what answers calls, each the root of its trace."""
        return TracedReception(self._traces, reception)

    def strategies(self, strategies: Mapping[str, Guidance]) -> Mapping[str, Guidance]:
        """Return what guides them, with spans of samples, scores and the choice."""
        return {name: TracedGuidance(self._traces, it) for name, it in strategies.items()}

    def log(self, log: Log) -> Log:
        """Return what stores replies, with a span for each."""
        return traced_log(self._traces, log)

    async def stop(self) -> None:
        """Export what waits, within the bound that is set."""
        await self._exporting.stop()
