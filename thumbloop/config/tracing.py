"""Settings of traces."""

from typing import Literal

from pydantic import Field

from thumbloop.config.shared import Section


class Tracing(Section):
    """Traces of requests, in OpenTelemetry's form."""

    enabled: bool = False
    """Trace requests; needs the extra `tracing`."""
    endpoint: str = Field("", pattern="^(https?://.*)?$")
    """Where an OTLP receiver listens; empty: as OTEL_EXPORTER_OTLP_ENDPOINT says, else this machine."""
    protocol: Literal["grpc", "http/protobuf"] | None = None
    """What it speaks; absent: as OTEL_EXPORTER_OTLP_PROTOCOL says, else grpc."""
    sample_ratio: float | None = Field(None, ge=0, le=1)
    """Share of traces that are kept, of those that no caller has decided about; absent: as
    OTEL_TRACES_SAMPLER says, else all."""
    content: bool = False
    """Put prompts, replies and comments into spans."""
    known_replies: int = Field(10_000, ge=0)
    """Replies whose spans are remembered, the latest, for feedback to be linked to them."""
    flush_timeout_s: float = Field(3.0, ge=0)
    """Longest the end of the server waits for the last spans to be taken, seconds."""
