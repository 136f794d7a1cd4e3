"""Metrics that are read off the server when Prometheus asks: which versions it holds, what a trial says."""

from collections.abc import Callable, Iterable

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.evidence import Look
from server.routes import Routes


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
        for held in self._routes.held:
            state, facts = self._routes.state_of(held.number), held.facts
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
            "Log of the most that bets have won that the canary's mean is higher, or lower; held: higher, now.",
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
            evidence.add_metric([name, "held"], found.log_held)
        return [users, means, evidence]
