"""What Prometheus sees of the server. Labels are bounded: never a user, a prompt or a reply."""

from collections.abc import Callable, Iterable

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.evidence import Look
from server.performing import Swap
from server.routes import Routes
from thumbloop.types import Feedback, FinishReason, Interaction, Preference

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_REWARDS = (-8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8)


class HeldVersions(Collector):
    """A 1 for each version that requests may reach, by number and by the digests of its adapters."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the family as it is now; as many series as the engine has room for versions."""
        family = GaugeMetricFamily(
            "thumbloop_policy_version_info",
            "Versions that the engine holds, with sha256 of their adapters.",
            labels=["version", "state", "policy_digest", "reward_digest"],
        )
        names = {number: name for name, number in self._routes.routed._asdict().items()}
        for held in self._routes.held:
            state = names.get(held.number, "held")
            facts = held.facts
            labels = [str(held.number), state, facts.policy_digest, facts.reward_digest]
            family.add_metric(labels, 1.0)
        return [family]


class CanaryEvidence(Collector):
    """What the users of a canary say of it, as long as it is tried."""

    def __init__(self, look: Callable[[], Look | None]) -> None:
        self._look = look

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the families as the last look at the trial found them; without series where there is none."""
        users = GaugeMetricFamily(
            "thumbloop_canary_users", "Users who count.", labels=["measure", "side"]
        )
        means = GaugeMetricFamily(
            "thumbloop_canary_mean", "Their mean, 0 to 1.", labels=["measure", "side"]
        )
        evidence = GaugeMetricFamily(
            "thumbloop_canary_log_evidence",
            "Log of what bets have won that the canary's mean is higher, or lower.",
            labels=["measure", "direction"],
        )
        look = self._look()
        for name, found in look.evidence.items() if look else ():
            users.add_metric([name, "canary"], found.canary_users)
            users.add_metric([name, "current"], found.current_users)
            means.add_metric([name, "canary"], found.canary_mean)
            means.add_metric([name, "current"], found.current_mean)
            evidence.add_metric([name, "higher"], found.log_higher)
            evidence.add_metric([name, "lower"], found.log_lower)
        return [users, means, evidence]


class ServerMetrics:
    """Our own metrics; vLLM's are on the same endpoint under their own names."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series each, of no use
        self.registry = CollectorRegistry()
        self.registry.register(REGISTRY)  # vLLM's, the process's and Python's
        r = self.registry
        method = ["grpc_service", "grpc_method"]
        self._started = Counter("grpc_server_started", "Calls started.", method, registry=r)
        self._handled = Counter(
            "grpc_server_handled", "Calls completed, by status.", [*method, "grpc_code"], registry=r
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds", "Time of a call.", method, buckets=_SECONDS, registry=r
        )
        self._http = Counter(
            "thumbloop_http_requests", "HTTP requests, by status.", ["route", "code"], registry=r
        )
        self._replies = Counter(
            "thumbloop_replies", "Replies, by strategy and arm.", ["strategy", "arm"], registry=r
        )
        self._candidates = Counter(
            "thumbloop_candidates",
            "Candidates sampled, by why there were not more, and whether they were aborted.",
            ["extent", "aborted"],
            registry=r,
        )
        self._fallbacks = Counter(
            "thumbloop_guidance_fallbacks",
            "Replies chosen by likelihood because scoring or time failed, by reason.",
            ["reason"],
            registry=r,
        )
        self.pruning_correlation = Gauge(
            "thumbloop_pruning_correlation",
            "Rank correlation of partial and final rewards, by checkpoint; of the current version.",
            ["checkpoint"],
            registry=r,
        )
        self.pruning_enabled = Gauge(
            "thumbloop_pruning_enabled",
            "1 where a checkpoint prunes, 0 where its correlation is too low.",
            ["checkpoint"],
            registry=r,
        )
        self._tokens = Counter(
            "thumbloop_tokens", "Tokens, by kind.", ["kind", "learning"], registry=r
        )
        self._reward = Histogram(
            "thumbloop_reward", "Reward of shown replies, logits.", buckets=_REWARDS, registry=r
        )
        self._first_text = Histogram(
            "thumbloop_time_to_first_text_seconds",
            "From a streamed call to its first text, by strategy.",
            ["strategy"],
            buckets=_SECONDS,
            registry=r,
        )
        self._feedback = Counter(
            "thumbloop_feedback", "Thumbs, by value and result.", ["thumb", "result"], registry=r
        )
        self._preferences = Counter(
            "thumbloop_preferences", "Preferences, by result.", ["result"], registry=r
        )
        self._imports = Counter(
            "thumbloop_imported_feedback",
            "Feedback from before that was brought in, by kind and result.",
            ["kind", "result"],
            registry=r,
        )
        self._swaps = Counter(
            "thumbloop_swaps", "Published versions tried, by result.", ["result"], registry=r
        )
        self._swap_seconds = Histogram(
            "thumbloop_published_to_serving_seconds",
            "From a version's publication until it answers.",
            buckets=_SECONDS,
            registry=r,
        )
        self.engine_restarts = Counter(
            "thumbloop_engine_restarts", "Engines started in place of one that died.", registry=r
        )
        self._collected = Counter(
            "thumbloop_collected_versions", "Versions whose folders were deleted.", registry=r
        )
        self._collected_bytes = Counter(
            "thumbloop_collected_bytes", "Size of what was deleted of them.", registry=r
        )
        self.version = Gauge("thumbloop_policy_version", "The version that answers.", registry=r)
        self.store_queue = Gauge(
            "thumbloop_store_queue_changes", "Changes waiting for a commit.", registry=r
        )
        self.unscrubbed = Gauge(
            "thumbloop_store_unscrubbed",
            "1 while files may hold remains of what was erased.",
            registry=r,
        )
        self._commit_seconds = Histogram(
            "thumbloop_store_commit_seconds", "Time of a commit.", buckets=_SECONDS, registry=r
        )
        self.candidates_in_flight = Gauge(
            "thumbloop_candidates_in_flight",
            "Candidates of requests that had their turn.",
            registry=r,
        )
        self.candidates_queued = Gauge(
            "thumbloop_candidates_queued", "Candidates of requests that wait for it.", registry=r
        )
        self.in_flight = Gauge(
            "thumbloop_requests_in_flight", "Generate calls being answered.", registry=r
        )

    def call_started(self, method: str) -> None:
        """Count a call."""
        self._started.labels(*_names(method)).inc()

    def call_handled(self, method: str, code: str, seconds: float) -> None:
        """Count a call's end."""
        service, name = _names(method)
        self._handled.labels(service, name, code).inc()
        self._seconds.labels(service, name).observe(seconds)

    def http_handled(self, route: str, code: int) -> None:
        """Count an HTTP request's end."""
        self._http.labels(route, str(code)).inc()

    def observe_reply(self, interaction: Interaction) -> None:
        """Count a reply and its candidates."""
        learning = interaction.learning.value
        self._replies.labels(interaction.strategy, interaction.arm.value).inc()
        for candidate in interaction.candidates:
            is_aborted = candidate.finish_reason is FinishReason.ABORTED
            self._candidates.labels(interaction.extent.value, str(is_aborted).lower()).inc()
        self._tokens.labels("prompt", learning).inc(len(interaction.prompt_token_ids))
        sampled = sum(len(c.token_ids) for c in interaction.candidates)
        self._tokens.labels("candidate", learning).inc(sampled)
        if interaction.chosen.reward is not None:
            self._reward.observe(interaction.chosen.reward)

    def observe_first_text(self, strategy: str, seconds: float) -> None:
        """Count a stream that said something."""
        self._first_text.labels(strategy).observe(seconds)

    def observe_fallback(self, reason: str) -> None:
        """Count a reply that was chosen without its rewards."""
        self._fallbacks.labels(reason).inc()

    def observe_feedback(self, feedback: Feedback) -> None:
        """Count a thumb."""
        result = "duplicate" if feedback.duplicate else "accepted"
        self._feedback.labels("up" if feedback.value else "down", result).inc()

    def observe_preference(self, preference: Preference) -> None:
        """Count a preference."""
        self._preferences.labels("duplicate" if preference.duplicate else "accepted").inc()

    def observe_import(self, kind: str, result: str) -> None:
        """Count something that somebody brought in; it is no traffic and counts as nothing else."""
        self._imports.labels(kind, result).inc()

    def observe_swap(self, swap: Swap) -> None:
        """Count a version that was tried."""
        self._swaps.labels(swap.result.value).inc()
        if swap.published_to_serving_s is not None:
            self._swap_seconds.observe(swap.published_to_serving_s)

    def observe_collected(self, size_bytes: int) -> None:
        """Count a version's folder that was deleted."""
        self._collected.inc()
        self._collected_bytes.inc(size_bytes)

    def observe_commit(self, _changes: int, seconds: float) -> None:
        """Count a commit of the store's writer."""
        self._commit_seconds.observe(seconds)


def _names(method: str) -> tuple[str, str]:
    _, service, name = method.split("/")
    return service, name
