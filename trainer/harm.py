"""Whether thumbs say that a child is worse than its parent, before anybody has met it.

Every thumb is weighted by how much likelier the child would have said what was rated, over how likely
guidance was to show it: the rate is that of the policies themselves, one sample each.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.calibration import Calibration
from trainer.drift import MAX_RATIO
from trainer.measure import response_logprobs
from trainer.models import Trunk
from trainer.off_policy import Clusters, Estimate, doubly_robust, effective_share, ratios, snips
from trainer.rollouts import Rollout, Thumb

Array = np.ndarray

MIN_USERS = 10
"""With fewer the thumbs of one reply, not of one user, count as independent: there is nothing better."""


class Rated(NamedTuple):
    """Thumbs on replies of which it is known how they came to be shown."""

    thumbs: tuple[Thumb, ...]
    samples: tuple[Rollout, ...]


class Values(NamedTuple):
    """Thumb rates of parent and child, and of their difference, by one estimator."""

    parent: Estimate
    child: Estimate

    @property
    def gain(self) -> Estimate:
        """Return the child's rate minus the parent's."""
        return self.child.minus(self.parent)


def rated_samples(thumbs: Sequence[Thumb]) -> Rated:
    """Return the thumbs that say something of other policies."""
    known = [t for t in thumbs if t.sample is not None and t.propensity is not None]
    return Rated(tuple(known), tuple(t.sample for t in known if t.sample is not None))


class ValueComparison:
    """What parent and child make of the same rated replies and candidates.

    Made while the parent is in the trunk; `values` is asked for when the child is. Either says of the
    candidates (M,) what was measured of them for the update: their log-probabilities (M,).
    """

    def __init__(
        self,
        trunk: Trunk,
        rated: Rated,
        candidates: Sequence[Rollout],
        of_candidates: Tensor,
        calibration: Calibration,
    ) -> None:
        self._trunk = trunk
        self._rated = rated
        self._is_whole = torch.tensor([c.is_finished for c in candidates], dtype=torch.bool)
        self._candidates = [c for c in candidates if c.is_finished]
        self._calibration = calibration
        is_crowd = len({r.user for r in rated.samples}) >= MIN_USERS
        self._cluster_of: Callable[[Rollout], str] = attrgetter(
            "user" if is_crowd else "response_id"
        )
        self._clusters = Clusters([*self._names(rated.samples), *self._names(self._candidates)])
        self._parent = self._logprobs(of_candidates)

    def values(self, of_candidates: Tensor) -> dict[str, Values]:
        """Return the estimates by name; those that have nothing to go by are missing."""
        if len(self._rated.thumbs) < 2:
            return {}
        child = self._logprobs(of_candidates)
        found = {"snips": Values(self._snips(self._parent), self._snips(child))}
        if self._can_predict:
            found["dr"] = Values(self._robust(self._parent), self._robust(child))
        return found

    def effective_share(self) -> float:
        """Return how many of the rated replies count for the policy that is in the trunk, as a share."""
        return effective_share(self._weights(self._of_rated()))

    @property
    def _can_predict(self) -> bool:
        """Say whether every reply has a reward from before anybody rated it."""
        everything = [*self._rated.samples, *self._candidates]
        return bool(self._candidates) and all(r.reward is not None for r in everything)

    def _logprobs(self, of_candidates: Tensor) -> tuple[Array, Array]:
        """Return what the trunk's policy thinks of the rated replies and of the whole candidates."""
        return self._of_rated(), of_candidates.cpu()[self._is_whole].double().numpy()

    def _of_rated(self) -> Array:
        if not self._rated.samples:
            return np.zeros(0)
        return response_logprobs(self._trunk, self._rated.samples).double().numpy()

    def _weights(self, logprobs: Array) -> Array:
        propensities = np.array([t.propensity for t in self._rated.thumbs])
        return np.asarray(
            ratios(logprobs, _logged(self._rated.samples), most=MAX_RATIO) / propensities
        )

    def _snips(self, logprobs: tuple[Array, Array]) -> Estimate:
        ups = np.array([float(t.is_up) for t in self._rated.thumbs])
        names = self._names(self._rated.samples)
        return snips(self._weights(logprobs[0]), ups, names, self._clusters)

    def _robust(self, logprobs: tuple[Array, Array]) -> Estimate:
        of_rated, of_candidates = logprobs
        weights = ratios(of_candidates, _logged(self._candidates), most=MAX_RATIO)
        predicted = self._predictions(self._candidates)
        direct = snips(weights, predicted, self._names(self._candidates), self._clusters)
        ups = np.array([float(t.is_up) for t in self._rated.thumbs])
        residuals = ups - self._predictions(self._rated.samples)
        names = self._names(self._rated.samples)
        return doubly_robust(direct, self._weights(of_rated), residuals, names, self._clusters)

    def _names(self, rollouts: Sequence[Rollout]) -> list[str]:
        return [self._cluster_of(rollout) for rollout in rollouts]

    def _predictions(self, rollouts: Sequence[Rollout]) -> Array:
        return self._calibration.probabilities([r.reward for r in rollouts if r.reward is not None])


def _logged(rollouts: Sequence[Rollout]) -> Array:
    return np.array([sum(r.logprobs) for r in rollouts])
