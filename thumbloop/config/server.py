"""Settings of `python -m server`."""

import itertools
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from thumbloop.config.delivery import Delivery
from thumbloop.config.shared import Metrics, Rewards, Section, ThumbloopSettings, thumbs_alone
from thumbloop.config.tracing import Tracing
from thumbloop.types import MAX_ID, Scope, Strategy

QUOTA = re.compile(r"[1-9]\d*/(second|minute|hour|day)")


class Listen(Section):
    """The gRPC port."""

    host: str = "127.0.0.1"
    """Address to bind; loopback unless there is authentication in front."""
    port: int = Field(50051, ge=0, le=65535)
    """TCP port; 0 takes a free one and prints it."""
    health_port: int | None = Field(None, ge=0, le=65535)
    """TCP port for probes that do no TLS, as Kubernetes': it answers grpc.health.v1 alone, and anybody; absent: none, health
    is on `port` all the same."""
    grace_s: float = Field(30.0, ge=0)
    """Seconds that calls in flight get to finish after SIGTERM."""
    max_message_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Largest request taken, bytes."""
    insecure: bool = False
    """Listen on a public address without TLS and tokens, because something in front has both; as
    --insecure does."""
    tls_certificate: Path | None = None
    """TLS: PEM file of the server's certificate and those that vouch for it; with tls_key."""
    tls_key: Path | None = None
    """TLS: PEM file of the certificate's private key."""
    tls_client_ca: Path | None = None
    """mTLS: PEM file of the authorities whose certificates clients have to show."""

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key need each other")
        if self.tls_client_ca is not None and self.tls_key is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        return self


class Http(Section):
    """The OpenAI-compatible HTTP port; TLS and tokens are those of the gRPC port."""

    enabled: bool = True
    """Serve it."""
    host: str = "127.0.0.1"
    """Address to bind."""
    port: int = Field(8080, ge=0, le=65535)
    """TCP port; 0 takes a free one and prints it."""
    stuck_timeout_s: float = Field(30.0, gt=0)
    """Seconds after which a connection whose other end takes nothing of what was sent is cut."""
    max_connections: int = Field(1024, ge=1)
    """Connections at once; one beyond it gets 503."""
    head_timeout_s: int = Field(10, ge=1)
    """Seconds a connection may stay open without the whole head of a request, after a reply too."""
    body_timeout_s: float = Field(30.0, gt=0)
    """Seconds a request's body may take; beyond it DEADLINE_EXCEEDED."""


class Token(Section):
    """A bearer token, known by its digest; `thumbloop token` makes one."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of the token, hexadecimal; the token itself is nowhere here."""
    scopes: tuple[Scope, ...] = Field(min_length=1)
    """What it is for: generate, feedback, on_behalf, admin, export."""


class Access(Section):
    """Who may call."""

    tokens: dict[str, Token] = Field(default_factory=dict)
    """Tokens by subject, each with `sha256` and `scopes`; none: whoever reaches the port may call."""

    @field_validator("tokens")
    @classmethod
    def _subjects_fit(cls, tokens: dict[str, Token]) -> dict[str, Token]:
        if any(not 1 <= len(subject) <= MAX_ID for subject in tokens):
            raise ValueError(f"a subject has 1 to {MAX_ID} characters")
        if len({token.sha256 for token in tokens.values()}) < len(tokens):
            raise ValueError("two subjects have the same token")
        return tokens


class Quotas(Section):
    """How much may be asked for in a time, counted in candidates, for instance 600/minute; empty: no quota."""

    per_user: str = ""
    """For each user."""
    per_token: str = ""
    """For each token, all its users together."""

    @field_validator("per_user", "per_token")
    @classmethod
    def _is_readable(cls, quota: str) -> str:
        if quota and not QUOTA.fullmatch(quota):
            raise ValueError("has to be like 600/minute; units: second, minute, hour, day")
        return quota


class FeedbackSettings(Section):
    """Which thumbs and preferences are taken."""

    window_s: float | None = Field(2_592_000.0, gt=0)
    """Seconds after a reply in which it may be rated, 30 days; later feedback is refused, a repeat of what
    was taken answered as before. null: for ever."""


class EngineSettings(Section):
    """vLLM."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and activations; auto is float32 on a CPU and bfloat16 on a GPU."""
    max_model_len: int | None = Field(None, ge=16)
    """Longest prompt plus reply plus verdict prompt, tokens; absent: the model's own limit."""
    max_num_seqs: int = Field(64, ge=1)
    """Sequences decoded together."""
    max_queued: int = Field(4096, ge=1)
    """Candidates and scores that may wait in the engine; beyond it RESOURCE_EXHAUSTED."""
    block_size: int = Field(32, ge=8, le=32)
    """Tokens of one KV block, on a CPU 32; small blocks let short prompts share a prefix, and the probes that prove a version have to fill three."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache on a CPU, GiB; on a GPU see gpu_memory_utilization."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of the GPU's memory that the engine may take."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share one copy of the model."""
    max_restarts_per_hour: int = Field(6, ge=0)
    """How often the engine is started again when it dies; then the server ends, for its supervisor to decide."""
    max_versions: int = Field(5, ge=3)
    """Versions held at once: current, incoming, draining, the others kept for pins; each takes two
    adapter slots."""
    max_rank: int = Field(16, ge=1)
    """Highest LoRA rank served."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the engine; absent: one for every core but one, which the server itself needs. On
    few cores a model of 100 million parameters or more gains more from the last core than the server."""
    grouped_lora: bool = True
    """On a CPU: one matrix product for all adapters of a batch, in place of vLLM's own operators."""
    merged_gib: float = Field(0.5, ge=0)
    """On a CPU in float32: adapters are merged into copies of the linear layers, where the copies for all
    slots, and what they are made of, take no more GiB than this; with grouped_lora only."""


class SamplingDefaults(Section):
    """Sampling of a candidate where the request says nothing."""

    max_tokens: int = Field(64, ge=1)
    """Most tokens of one candidate."""
    temperature: float = Field(1.0, ge=0, le=2)
    """Softmax temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus mass; below 1 replies are not trained on."""
    top_k: int = Field(0, ge=0)
    """Only the k most likely tokens; 0 means all."""


class Limits(Section):
    """What one request may ask for."""

    max_tokens: int = Field(1024, ge=1)
    """Most tokens of one candidate that a request may ask for."""
    max_candidates: int = Field(16, ge=1)
    """Most candidates of one request."""
    max_stop: int = Field(8, ge=0)
    """Most stop texts of one request, each of at most 128 characters."""
    max_prompt_characters: int = Field(200_000, ge=1)
    """Longest prompt, characters, refused before it is tokenised."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt, tokens; absent: what the model's context leaves."""
    max_requests_in_flight: int = Field(1024, ge=1)
    """Calls for replies inside at once, waiting ones included; beyond it RESOURCE_EXHAUSTED."""
    max_candidates_in_flight: int = Field(128, ge=1)
    """Candidates of all requests that may be sampled at once; later requests wait for their turn."""
    max_tokens_in_flight: int = Field(262_144, ge=1)
    """Tokens that those may come to, their prompts included."""
    max_queued_candidates: int = Field(128, ge=0)
    """Candidates of all requests that wait; beyond it RESOURCE_EXHAUSTED."""
    max_waiting_repeats: int = Field(16, ge=0)
    """Repeats of one request, by its id, that wait while it is answered; beyond it RESOURCE_EXHAUSTED."""
    retry_after_s: float = Field(1.0, ge=0)
    """When a caller is told to come back where the queue is full, seconds."""
    default_timeout_s: float = Field(120.0, gt=0)
    """Seconds a caller waits for a reply where it says nothing."""
    max_timeout_s: float = Field(600.0, gt=0)
    """Longest a caller may want to wait, seconds; longer deadlines are cut to it."""
    max_unread_characters: int = Field(65_536, ge=1)
    """Text of a stream that is kept for a reader who does not read; beyond it the stream ends with
    RESOURCE_EXHAUSTED."""


class Checkpoint(Section):
    """Where speculative rejection looks at partial replies."""

    at: float = Field(gt=0, lt=1)
    """Share of an ordinary reply's tokens after which candidates are scored."""
    keep: float = Field(gt=0, lt=1)
    """Share of the request's candidates that go on, at least one."""


class Guidance(Section):
    """How the shown candidate is chosen where the request says nothing."""

    strategy: str = Strategy.SOFT_BEST_OF_N.value
    """none, best_of_n, soft_best_of_n, speculative_rejection, or one added to the server."""
    num_candidates: int = Field(4, ge=1, le=64)
    """Responses sampled per prompt; 1 turns guidance off."""
    temperature: float = Field(0.5, gt=0, le=100)
    """Temperature of the soft choice, reward units (logits); small is greedy."""
    audit_share: float = Field(0.03, ge=0, le=1)
    """Share of requests that show a uniformly random candidate; keeps every propensity positive."""
    first_wave: int = Field(0, ge=0, le=64)
    """Candidates sampled first, the rest only where those are not good enough; 0 samples all at once."""
    first_wave_quantile: float = Field(0.5, gt=0, lt=1)
    """A first wave is good enough from this quantile of the best rewards that audits had."""
    checkpoints: tuple[Checkpoint, ...] = (Checkpoint(at=0.3, keep=0.375),)
    """Where speculative rejection looks: `at` a share of an ordinary reply's tokens, in (0, 1), to `keep` a
    share of the candidates, in (0, 1); later ones keep fewer."""
    min_rank_correlation: float = Field(0.5, ge=-1, le=1)
    """A checkpoint stops pruning when audits find its partial rewards to agree less with final ones."""
    min_audits: int = Field(20, ge=1)
    """Audits of a version before they decide about waves and checkpoints."""
    scoring_timeout_s: float = Field(5.0, gt=0)
    """Seconds after which a reply is chosen without its rewards."""
    deadline_margin_s: float = Field(0.1, ge=0)
    """Seconds before a caller's deadline at which the answer is chosen from what there is."""

    @model_validator(mode="after")
    def _checkpoints_are_in_order(self) -> Self:
        for earlier, later in itertools.pairwise(self.checkpoints):
            if not (earlier.at < later.at and earlier.keep > later.keep):
                raise ValueError("checkpoints have to come later and keep fewer, one after another")
        return self


class ServerConfig(ThumbloopSettings):
    """Settings of `python -m server`."""

    model_config = SettingsConfigDict(env_prefix="THUMBLOOP_SERVER_")

    listen: Listen = Listen()
    """The gRPC port."""
    http: Http = Http()
    """The OpenAI-compatible HTTP port."""
    access: Access = Access()
    """Who may call."""
    quotas: Quotas = Quotas()
    """How much may be asked for in a time."""
    metrics: Metrics = Metrics()
    """The Prometheus endpoint."""
    tracing: Tracing = Tracing()
    """Traces of requests, in OpenTelemetry's form."""
    engine: EngineSettings = EngineSettings()
    """vLLM."""
    sampling: SamplingDefaults = SamplingDefaults()
    """Sampling where the request says nothing."""
    guidance: Guidance = Guidance()
    """Choice where the request says nothing."""
    limits: Limits = Limits()
    """What one request may ask for."""
    feedback: FeedbackSettings = FeedbackSettings()
    """Which thumbs and preferences are taken."""
    delivery: Delivery = Delivery()
    """How a published version comes to answer."""
    rewards: Rewards = Field(default_factory=thumbs_alone)
    """What candidates are ranked by: components by name, each with `kind`, `weight` and what its kind
    takes (`target_tokens`, `scale_tokens`, `pattern`, `path`, `threads`). Weights sum to 1."""

    @model_validator(mode="after")
    def _defaults_within_limits(self) -> Self:
        if self.guidance.num_candidates > self.limits.max_candidates:
            raise ValueError("guidance.num_candidates is above limits.max_candidates")
        if self.limits.max_candidates > self.limits.max_candidates_in_flight:
            raise ValueError("limits.max_candidates is above limits.max_candidates_in_flight")
        if 0 < self.sampling.temperature < 0.01:
            raise ValueError("sampling.temperature has to be 0 (greedy) or at least 0.01")
        if self.sampling.max_tokens > self.limits.max_tokens:
            raise ValueError("sampling.max_tokens is above limits.max_tokens")
        return self
