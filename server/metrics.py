"""What Prometheus sees of the server. Labels are bounded: never a user, a prompt or a reply."""

import re

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

from server.access import ROUTES
from server.by_version import ByVersion
from server.collectors import HeldVersions
from server.delivery_metrics import DeliveryMetrics
from server.routes import Routes
from thumbloop.errors import ThumbloopError
from thumbloop.types import (
    Feedback,
    FinishReason,
    Interaction,
    Preference,
    Status,
    promise_of,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_REWARDS = (-8, -4, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8)
_LIFTS = (-2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2, 4)
_PROPENSITIES = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)

_FEEDBACK = {  # what comes in by which call
    "/thumbloop.v1.FeedbackService/SubmitFeedback": "thumb",
    "/thumbloop.v1.FeedbackService/SubmitPreference": "preference",
    "POST /v1/feedback": "thumb",
}
_GIVEN_UP = ("cancelled", "corrupted", "failed")


class ServerMetrics:
    """Our own metrics; vLLM's are on the same endpoint under their own names."""

    def __init__(self, routes: Routes | None = None) -> None:
        """Tell versions apart by their routes; without any, all are gone."""
        self._routes = routes or Routes()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series each, of no use
        self.registry = CollectorRegistry()
        self.registry.register(REGISTRY)  # vLLM's, the process's and Python's
        self.registry.register(HeldVersions(self._routes))
        r = self.registry
        self._by_version = ByVersion(r)
        self.delivery = DeliveryMetrics(r)
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
        self._http_seconds = Histogram(
            "thumbloop_http_request_seconds",
            "Time of an HTTP request, until all of its answer is sent.",
            ["route"],
            buckets=_SECONDS,
            registry=r,
        )
        for route in ROUTES:
            self._http.labels(route, "200")  # there from the start, as a sum needs all its parts
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
        self._lift = Histogram(
            "thumbloop_rerank_lift",
            "Reward of the shown reply minus the mean of its candidates, logits.",
            buckets=_LIFTS,
            registry=r,
        )
        self._rerank_seconds = Histogram(
            "thumbloop_rerank_seconds",
            "From a reply's last sampled candidate until one was chosen by its reward.",
            buckets=_SECONDS,
            registry=r,
        )
        self._propensity = Histogram(
            "thumbloop_propensity",
            "Probability with which guidance chose the shown reply.",
            buckets=_PROPENSITIES,
            registry=r,
        )
        self._given_up = Counter(
            "thumbloop_given_up",
            "Requests that came to nothing, by reason.",
            ["reason"],
            registry=r,
        )
        self._first_text = Histogram(
            "thumbloop_time_to_first_text_seconds",
            "From a streamed call to its first text, by strategy.",
            ["strategy"],
            buckets=_SECONDS,
            registry=r,
        )
        self._feedback = Counter(
            "thumbloop_feedback",
            "Thumbs, by value, result and where the version is that replied.",
            ["thumb", "result", "state"],
            registry=r,
        )
        self._refused = Counter(
            "thumbloop_feedback_rejected",
            "Thumbs and preferences that were refused, by reason.",
            ["kind", "reason"],
            registry=r,
        )
        self.last_feedback = Gauge(
            "thumbloop_last_feedback_timestamp_seconds",
            "When the last thumb or preference was taken, unix time; 0 where there is none.",
            registry=r,
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
        self.engine_restarts = Counter(
            "thumbloop_engine_restarts", "Engines started in place of one that died.", registry=r
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
        self.store_errors = Counter(
            "thumbloop_store_errors", "Commits that the database did not take.", registry=r
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
        for reason in _GIVEN_UP:
            self._given_up.labels(reason)

    def call_started(self, method: str) -> None:
        """Count a call."""
        self._started.labels(*_names(method)).inc()

    def call_handled(self, method: str, code: str, seconds: float) -> None:
        """Count a call's end."""
        service, name = _names(method)
        self._handled.labels(service, name, code).inc()
        self._seconds.labels(service, name).observe(seconds)

    def http_handled(self, route: str, code: int) -> None:
        """Count an HTTP request that has its status."""
        self._http.labels(route, str(code)).inc()

    def http_sent(self, route: str, seconds: float) -> None:
        """Time an HTTP request whose answer is sent; one that has no route is nobody's."""
        if route in ROUTES:
            self._http_seconds.labels(route).observe(seconds)

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
        chosen = interaction.chosen
        if chosen.propensity is not None:
            self._propensity.observe(chosen.propensity)
        if chosen.reward is not None:
            self._reward.observe(chosen.reward)
            promise = promise_of(chosen.reward, chosen.reward_components)
            if promise is not None:
                self._by_version.observe_reward(interaction.policy_version, promise)
            rewards = [c.reward for c in interaction.candidates if c.reward is not None]
            if interaction.reranked:
                self._lift.observe(chosen.reward - sum(rewards) / len(rewards))

    def observe_row(self, interaction: Interaction) -> None:
        """Count a request that came to nothing."""
        if interaction.status is not Status.COMPLETED:
            self._given_up.labels(interaction.untrainable_reason).inc()

    def observe_rerank(self, seconds: float) -> None:
        """Count the time that a choice by rewards took beyond sampling."""
        self._rerank_seconds.observe(seconds)

    def observe_first_text(self, strategy: str, seconds: float) -> None:
        """Count a stream that said something."""
        self._first_text.labels(strategy).observe(seconds)

    def observe_fallback(self, reason: str) -> None:
        """Count a reply that was chosen without its rewards."""
        self._fallbacks.labels(reason).inc()

    def observe_feedback(self, feedback: Feedback) -> None:
        """Count a thumb."""
        result = "duplicate" if feedback.duplicate else "accepted"
        state = self._routes.state_of(feedback.policy_version)
        self._feedback.labels("up" if feedback.value else "down", result, state).inc()
        if not feedback.duplicate:
            self._by_version.observe_thumb(feedback.policy_version, is_up=bool(feedback.value))
            self.last_feedback.set(feedback.created_at)

    def observe_preference(self, preference: Preference) -> None:
        """Count a preference."""
        self._preferences.labels("duplicate" if preference.duplicate else "accepted").inc()
        if not preference.duplicate:
            self.last_feedback.set(preference.created_at)

    def observe_import(self, kind: str, result: str) -> None:
        """Count something that somebody brought in; it is no traffic and counts as nothing else."""
        self._imports.labels(kind, result).inc()

    def observe_refusal(self, method: str, error: Exception) -> None:
        """Count a thumb or a preference that was refused, whoever refused it; the reason is the error's name."""
        kind = _FEEDBACK.get(method)
        if kind is None or not isinstance(error, ThumbloopError):
            return
        reason = re.sub(r"(?<!^)([A-Z])", r"_\1", type(error).__name__).lower()
        self._refused.labels(kind, reason).inc()

    def observe_commit(self, _changes: int, seconds: float) -> None:
        """Count a commit of the store's writer."""
        self._commit_seconds.observe(seconds)


def _names(method: str) -> tuple[str, str]:
    _, service, name = method.split("/")
    return service, name
