"""What the dashboard shows, row by row: titles and queries, without Grafana."""

from collections.abc import Mapping
from typing import NamedTuple


class Chart(NamedTuple):
    """One panel: its queries by legend, in Prometheus' language, and their unit as Grafana calls it."""

    title: str
    queries: Mapping[str, str]
    unit: str = "short"
    words: str = ""


_INTERVAL = "[$__rate_interval]"
_REPLY_TIMES = (  # over both wires, whose buckets are the same
    f'sum by (le) (rate(grpc_server_handling_seconds_bucket{{grpc_method=~"Generate|StreamGenerate"}}{_INTERVAL})'
    f' or rate(thumbloop_http_request_seconds_bucket{{route=~".*completions"}}{_INTERVAL}))'
)


def _quantile(q: float, name: str, *, by: str = "", of: str = "", over: str = _INTERVAL) -> str:
    """Return the query for a quantile of a histogram."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({name}_bucket{{{of}}}{over})))"


def _mean(name: str, *, by: str) -> str:
    """Return the query for the mean of a summary, over ten minutes."""
    return f"sum by ({by}) (rate({name}_sum[10m])) / sum by ({by}) (rate({name}_count[10m]))"


def _values(*names: str) -> str:
    """Return the query for numbers of the last round."""
    return f'thumbloop_trainer_value{{name=~"{"|".join(names)}"}}'


TRIAL = "Evidence of a trial"

ROWS: Mapping[str, tuple[Chart, ...]] = {
    "Traffic": (
        Chart(
            "Calls",
            {
                "{{grpc_method}}": f"sum by (grpc_method) (rate(grpc_server_handled_total{_INTERVAL}))",
                "{{route}}": f"sum by (route) (rate(thumbloop_http_requests_total{_INTERVAL}))",
            },
            "reqps",
        ),
        Chart(
            "Time of a reply",
            {
                "median": f"histogram_quantile(0.5, {_REPLY_TIMES})",
                "95 %": f"histogram_quantile(0.95, {_REPLY_TIMES})",
            },
            "s",
        ),
        Chart(
            "Calls that do not succeed",
            {
                "share": f'1 - (sum(rate(grpc_server_handled_total{{grpc_code="OK"}}{_INTERVAL}))'
                f' + sum(rate(thumbloop_http_requests_total{{code="200"}}{_INTERVAL})))'
                f" / (sum(rate(grpc_server_handled_total{_INTERVAL}))"
                f" + sum(rate(thumbloop_http_requests_total{_INTERVAL})))"
            },
            "percentunit",
        ),
        Chart(
            "Candidates",
            {
                "in flight": "thumbloop_candidates_in_flight",
                "queued": "thumbloop_candidates_queued",
                "a reply": f"sum(rate(thumbloop_candidates_total{_INTERVAL}))"
                f" / sum(rate(thumbloop_replies_total{_INTERVAL}))",
            },
        ),
        Chart(
            "Reranking",
            {
                "gain, median": _quantile(0.5, "thumbloop_rerank_lift"),
                "time, 95 %, s": _quantile(0.95, "thumbloop_rerank_seconds"),
            },
            words="Reward of the shown reply minus the mean of its candidates, and what choosing takes.",
        ),
    ),
    "Thumbs": (
        Chart(
            "Thumbs up, by version",
            {"version {{version}}": _mean("thumbloop_version_thumb_up_ratio", by="version")},
            "percentunit",
        ),
        Chart(
            "Thumbs up that rewards promise, by version",
            {"version {{version}}": _mean("thumbloop_version_promise_ratio", by="version")},
            "percentunit",
            "Where this rises and thumbs fall, the policy has found a hole in the reward model.",
        ),
        Chart(
            "Thumbs a minute",
            {
                "{{thumb}}, {{state}}": "60 * sum by (thumb, state)"
                f" (rate(thumbloop_feedback_total{_INTERVAL}))"
            },
        ),
        Chart("Reward, median", {"logit": _quantile(0.5, "thumbloop_reward")}),
        Chart(
            "Since",
            {
                "the last thumb": "time() - (thumbloop_last_feedback_timestamp_seconds > 0)",
                "the last new version": "time() - (thumbloop_trainer_last_success_timestamp_seconds > 0)",
                "the trainer looked": "time() - thumbloop_trainer_last_look_timestamp_seconds",
            },
            "s",
        ),
    ),
    "Delivery": (
        Chart(
            "Versions",
            {
                "serving": "thumbloop_policy_version",
                "trained from": "thumbloop_trainer_parent_version",
            },
        ),
        Chart("Versions tried", {"{{result}}": "sum by (result) (thumbloop_swaps_total)"}),
        Chart(
            "From a thumb to a version that learned from it",
            {
                "median": _quantile(0.5, "thumbloop_feedback_to_serving_seconds", over="[1d]"),
                "95 %": _quantile(0.95, "thumbloop_feedback_to_serving_seconds", over="[1d]"),
            },
            "s",
        ),
        Chart(
            "Swap",
            {
                "trying it, 95 %": _quantile(0.95, "thumbloop_swap_seconds", over="[1d]"),
                "from publication, 95 %": _quantile(
                    0.95, "thumbloop_published_to_serving_seconds", over="[1d]"
                ),
            },
            "s",
        ),
        Chart(
            TRIAL,
            {
                "{{direction}}": 'thumbloop_canary_log_evidence{measure="thumbs"}',
                "users, {{side}}": 'thumbloop_canary_users{measure="thumbs"}',
            },
            words="Natural log of what bets have won. Empty while no version is on trial.",
        ),
    ),
    "Learning": (
        Chart("Rounds", {"{{outcome}}": "sum by (outcome) (thumbloop_trainer_rounds_total)"}),
        Chart(
            "Feedback",
            {
                "new": "thumbloop_trainer_new_feedback",
                "starts a round": "thumbloop_trainer_needed_feedback",
                "left out, {{reason}}": "sum by (reason) (thumbloop_trainer_left_out)",
            },
        ),
        Chart(
            "Reward model and critic",
            {
                "{{name}}": _values(
                    "reward_auroc",
                    "reward_calibration_error",
                    "explained_variance",
                    "effective_sample_share",
                )
            },
        ),
        Chart(
            "Divergence from the base model",
            {
                "nats a reply": _values("kl_to_reference"),
                "limit": 'thumbloop_trainer_limit{name="kl_to_reference"}',
            },
        ),
        Chart(
            "Policy step",
            {"{{name}}": _values("clip_fraction", "approx_kl", "entropy", "rollout_staleness")},
        ),
    ),
    "Health": (
        Chart(
            "Alerts that fire",
            {"alerts": 'count(ALERTS{alertstate="firing"}) or vector(0)'},
        ),
        Chart(
            "Requests that came to nothing, an hour",
            {
                "{{reason}}": "sum by (reason) (increase(thumbloop_given_up_total[1h]))",
                "store errors": "increase(thumbloop_store_errors_total[1h])",
            },
        ),
        Chart(
            "Store",
            {
                "commit, 95 %, s": _quantile(0.95, "thumbloop_store_commit_seconds"),
                "changes that wait": "thumbloop_store_queue_changes",
            },
        ),
        Chart(
            "Engine",
            {
                "requests": "vllm:num_requests_running",
                "waiting": "vllm:num_requests_waiting",
                "KV cache in use": "vllm:kv_cache_usage_perc",
            },
        ),
        Chart(
            "Memory of the server",
            {"resident": 'process_resident_memory_bytes{job="thumbloop-server"}'},
            "bytes",
        ),
    ),
}
