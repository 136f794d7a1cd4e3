"""Where spans go: to an OTLP endpoint, in batches, from a thread of their own and a queue with an end."""

import asyncio
import logging
import os
from threading import Thread

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from thumbloop.config.tracing import Tracing

log = logging.getLogger(__name__)

_SERVICE = "thumbloop-server"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class Exporting:
    """A provider of tracers whose spans are exported until it is stopped."""

    def __init__(self, settings: Tracing, exporter: SpanExporter | None = None) -> None:
        self._exporter = exporter or _exporter_of(settings)
        self._timeout_s = settings.flush_timeout_s
        ratio = settings.sample_ratio
        self.provider = TracerProvider(
            # None: as OTEL_TRACES_SAMPLER says
            sampler=None if ratio is None else ParentBased(TraceIdRatioBased(ratio)),
            resource=_resource(),
            shutdown_on_exit=False,
        )
        self.provider.add_span_processor(BatchSpanProcessor(self._exporter))

    async def stop(self) -> None:
        """Export what waits, for as long as it may take and no longer."""
        stopping = Thread(target=self.provider.shutdown, daemon=True)
        stopping.start()
        await asyncio.to_thread(stopping.join, self._timeout_s)
        if stopping.is_alive():
            log.warning("the last traces are lost: not taken within %g s", self._timeout_s)
            await asyncio.to_thread(self._exporter.shutdown)  # which ends its retries


def _resource() -> Resource:
    """Return who we are; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win."""
    found = Resource.create()
    is_named = not str(found.attributes[SERVICE_NAME]).startswith("unknown_service")
    return found if is_named else found.merge(Resource({SERVICE_NAME: _SERVICE}))


def _exporter_of(settings: Tracing) -> SpanExporter:
    """Return the exporter of the protocol that the settings, else the environment, name."""
    named: list[str] = [os.environ[name] for name in _PROTOCOLS if name in os.environ]
    protocol = settings.protocol or (named or ["grpc"])[0]
    endpoint = settings.endpoint or None  # None: as OTEL_EXPORTER_OTLP_ENDPOINT says
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

    return OverHttp(endpoint)
