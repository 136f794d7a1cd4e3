"""What users and the reward model say of each policy version, of the latest few that were heard of.

Numbers of versions grow for ever, the number of series does not.
"""

import math
from collections import OrderedDict

from prometheus_client import CollectorRegistry, Summary


class ByVersion:
    """Two numbers in [0, 1] for each version: the share of thumbs up that came, and that rewards promised."""

    def __init__(self, registry: CollectorRegistry, *, most: int = 8) -> None:
        """Keep at most `most` versions; the one that nothing was heard of for longest goes."""
        self._most = most
        self._heard: OrderedDict[int, None] = OrderedDict()
        self._promises = Summary(
            "thumbloop_version_promise_ratio",
            "Probability of a thumb up that a shown reply's reward promises, by version.",
            ["version"],
            registry=registry,
        )
        self._thumbs = Summary(
            "thumbloop_version_thumb_up_ratio",
            "1 for a thumb up, 0 for a thumb down, by the version that replied.",
            ["version"],
            registry=registry,
        )

    def observe_reward(self, version: int, reward: float) -> None:
        """Count a shown reply's reward, the logit of a thumb up."""
        self._hear(version)
        promise = 0.5 * (1 + math.tanh(reward / 2))  # sigmoid, of large logits too
        self._promises.labels(str(version)).observe(promise)

    def observe_thumb(self, version: int, *, is_up: bool) -> None:
        """Count a thumb."""
        self._hear(version)
        self._thumbs.labels(str(version)).observe(float(is_up))

    def _hear(self, version: int) -> None:
        self._heard[version] = None
        self._heard.move_to_end(version)
        for family in (self._promises, self._thumbs):
            family.labels(str(version))
        if len(self._heard) > self._most:
            forgotten, _ = self._heard.popitem(last=False)
            for family in (self._promises, self._thumbs):
                family.remove(str(forgotten))
