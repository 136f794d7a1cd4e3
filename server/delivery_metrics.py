"""What Prometheus sees of versions on their way to users."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.performing import Swap
from thumbloop.types import VersionState

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LONG = (1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 10_800, 43_200, 86_400, 604_800)

# What alerts look at is there from the start: Prometheus sees no increase in what begins with 1.
_SWAPS = (
    VersionState.CANARY,
    VersionState.CURRENT,
    VersionState.REJECTED,
    VersionState.ROLLED_BACK,
)
NOT_AS_PUBLISHED = (
    "attestation",
    "extra_file",
    "file_altered",
    "file_missing",
    "link",
    "manifest_altered",
    "manifest_missing",
    "wrong_digest",
    "wrong_folder",
    "wrong_version",
)
"""Reasons of a rejection that say: the adapter is not the one that the trainer published."""


class DeliveryMetrics:
    """Counts and times of swaps."""

    def __init__(self, registry: CollectorRegistry) -> None:
        r = registry
        self._swaps = Counter(
            "thumbloop_swaps", "Published versions tried, by result.", ["result"], registry=r
        )
        self._rejected = Counter(
            "thumbloop_versions_rejected",
            "Published versions that failed a check, by reason.",
            ["reason"],
            registry=r,
        )
        self._try_seconds = Histogram(
            "thumbloop_swap_seconds",
            "Time to verify, load and attest a version, by result.",
            ["result"],
            buckets=_SECONDS,
            registry=r,
        )
        self._swap_seconds = Histogram(
            "thumbloop_published_to_serving_seconds",
            "From a version's publication until it answers.",
            buckets=_SECONDS,
            registry=r,
        )
        self._collected = Counter(
            "thumbloop_collected_versions", "Versions whose folders were deleted.", registry=r
        )
        self._collected_bytes = Counter(
            "thumbloop_collected_bytes", "Size of what was deleted of them.", registry=r
        )
        self._feedback_to_serving = Histogram(
            "thumbloop_feedback_to_serving_seconds",
            "From a thumb until a version that learned from it answers.",
            buckets=_LONG,
            registry=r,
        )
        for result in _SWAPS:
            self._swaps.labels(result.value)
        for result in (VersionState.CANARY, VersionState.CURRENT, VersionState.REJECTED):
            self._try_seconds.labels(result.value)
        for reason in NOT_AS_PUBLISHED:
            self._rejected.labels(reason)

    def observe_swap(self, swap: Swap) -> None:
        """Count a version that was tried."""
        self._swaps.labels(swap.result.value).inc()
        if swap.reason:
            self._rejected.labels(swap.reason).inc()
        if swap.took_s is not None:
            self._try_seconds.labels(swap.result.value).observe(swap.took_s)
        for seconds in swap.feedback_to_serving_s:
            self._feedback_to_serving.observe(seconds)
        if swap.published_to_serving_s is not None:
            self._swap_seconds.observe(swap.published_to_serving_s)

    def observe_collected(self, size_bytes: int) -> None:
        """Count a version's folder that was deleted."""
        self._collected.inc()
        self._collected_bytes.inc(size_bytes)
