"""Whether thumbs say that a child is worse than its parent, before anybody has met it.

Every thumb is weighted by how much likelier the child would have said what was rated, over how likely
guidance was to show it: the rate is that of the policies themselves, one sample each.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from torch import Tensor

from trainer.calibration import Calibration
from trainer.drift import MAX_RATIO
from trainer.measure import response_logprobs
from trainer.models import Trunk
from trainer.off_policy import (
    Clusters,
    Estimate,
    by_design,
    doubly_robust,
    effective_share,
    moves_of_rate,
    ratios,
    snips,
    spread,
)
from trainer.rollouts import Rollout, Thumb

Array = np.ndarray

_ROUNDING = 1e-6
MIN_USERS = 10
"""With fewer the thumbs of one reply, not of one user, count as independent: there is nothing better."""


class Rated(NamedTuple):
    """Thumbs on replies of which it is known how they came to be shown."""

    thumbs: tuple[Thumb, ...]
    samples: tuple[Rollout, ...]


class Values(NamedTuple):
    """Thumb rates of parent and child, and of their difference, by one estimator.

    `effective_share` is Kish's, of the replies whose thumbs it is made of: how many of them the child would still
    say. How they were chosen to be shown does not enter.
    """

    parent: Estimate
    child: Estimate
    effective_share: float

    @property
    def gain(self) -> Estimate:
        """Return the child's rate minus the parent's."""
        return self.child.minus(self.parent)


class Weights(NamedTuple):
    """How much replies count for a policy: rated ones (N,), these by propensity too (N,), and candidates with a
    reward (M,)."""

    said: Array
    rated: Array
    candidates: Array


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
        self._ups = np.array([float(t.is_up) for t in rated.thumbs])
        self._is_scored = np.array([r.reward is not None for r in rated.samples], dtype=bool)
        self._are_known = np.array(
            [c.is_finished and c.reward is not None for c in candidates], dtype=bool
        )
        self._measured = [_words(c) for c in candidates]
        self._candidates = [
            c for c, is_known in zip(candidates, self._are_known, strict=True) if is_known
        ]
        self._calibration = calibration
        self._predicted = self._predictions(self._candidates)
        self._is_whole = are_whole(self._candidates)
        whole = [c for c, is_in in zip(self._candidates, self._is_whole, strict=True) if is_in]
        self._propensities = np.array([c.propensity for c in whole])
        self._requests = len({c.response_id for c in whole})
        is_crowd = len({r.user for r in rated.samples}) >= MIN_USERS
        self._cluster_of: Callable[[Rollout], str] = attrgetter(
            "user" if is_crowd else "response_id"
        )
        self._clusters = Clusters([*self._names(rated.samples), *self._names(self._candidates)])
        self._parent = self._weights(of_candidates)

    def values(self, of_candidates: Tensor) -> dict[str, Values]:
        """Return the estimates by name; those that have nothing to go by are missing."""
        parent, child = self._parent, self._weights(of_candidates)
        everything, found = np.ones(len(self._rated.thumbs), dtype=bool), dict[str, Values]()
        if self._can_estimate(everything, parent, child):
            share = effective_share(child.said)
            found["snips"] = Values(self._snips(parent), self._snips(child), share)
        if self._can_estimate(self._is_scored, parent, child) and self._can_predict(parent, child):
            share = effective_share(child.said[self._is_scored])
            found["dr"] = Values(self._robust(parent), self._robust(child), share)
        return found

    def _weights(self, of_candidates: Tensor) -> Weights:
        """Return how much the rated replies and the known candidates count for the trunk's policy."""
        propensities = np.array([t.propensity for t in self._rated.thumbs])
        of_rated = self._of_rated(of_candidates)
        of_known = of_candidates.double().cpu().numpy()[self._are_known]
        said = ratios(of_rated, _logged(self._rated.samples), most=MAX_RATIO)
        return Weights(
            said,
            said / propensities,
            ratios(of_known, _logged(self._candidates), most=MAX_RATIO),
        )

    def _of_rated(self, of_candidates: Tensor) -> Array:
        """Return the log-probability of each rated reply (N,); those that are candidates too have been measured."""
        known = dict(zip(self._measured, of_candidates.tolist(), strict=True))
        others = [r for r in self._rated.samples if _words(r) not in known]
        known |= zip(
            map(_words, others), response_logprobs(self._trunk, others).tolist(), strict=True
        )
        return np.array([known[_words(r)] for r in self._rated.samples])

    def _can_estimate(self, which: Array, *policies: Weights) -> bool:
        """Say whether these rated replies (N,) are of several clusters and count for all policies."""
        names = {
            self._cluster_of(r)
            for r, is_in in zip(self._rated.samples, which, strict=True)
            if is_in
        }
        return len(names) > 1 and all(weights.rated[which].any() for weights in policies)

    def _can_predict(self, *policies: Weights) -> bool:
        """Say whether candidates with a reward from before anybody rated them count for all policies.

        Those without one, of a version that had no reward model or when scoring failed, are left aside.
        """
        return all(weights.candidates.any() for weights in policies)

    def _snips(self, weights: Weights) -> Estimate:
        names = self._names(self._rated.samples)
        estimate = snips(weights.rated, self._ups, names, self._clusters)
        moves = self._moves(weights, len(self._ups))
        return estimate._replace(
            expected=moves_of_rate(moves, self._predicted[self._is_whole], estimate.value)
        )

    def _robust(self, weights: Weights) -> Estimate:
        names = self._names(self._candidates)
        direct = snips(weights.candidates, self._predicted, names, self._clusters)
        scored = [r for r in self._rated.samples if r.reward is not None]
        residuals = self._ups[self._is_scored] - self._predictions(scored)
        of_scored = weights.rated[self._is_scored]
        estimate = doubly_robust(direct, of_scored, residuals, self._names(scored), self._clusters)
        moves = self._moves(weights, len(scored))
        return estimate._replace(expected=moves * spread(self._predicted[self._is_whole]))

    def _moves(self, weights: Weights, rated: int) -> Array:
        """Return by how much candidates of whole requests are expected to move an estimate, for each unit that their
        thumbs are off."""
        said = weights.candidates[self._is_whole]
        if not said.any():
            return np.zeros_like(said)
        return by_design(said, self._propensities, requests=self._requests, rated=rated)

    def _names(self, rollouts: Sequence[Rollout]) -> list[str]:
        return [self._cluster_of(rollout) for rollout in rollouts]

    def _predictions(self, rollouts: Sequence[Rollout]) -> Array:
        return self._calibration.probabilities([r.reward for r in rollouts if r.reward is not None])


def describe_values(values: Mapping[str, Values]) -> dict[str, float]:
    """Return the estimated thumb rates, and the 95 % intervals of the child's and of the difference.

    An estimate may be outside [0, 1]; the rate it stands for is not, and the nearest one is closer to it.
    """
    described: dict[str, float] = {}
    for name, each in values.items():
        described |= {f"{name}_parent": _rate(each.parent), f"{name}_child": _rate(each.child)}
        for what, estimate, least in (("child", each.child, 0.0), ("gain", each.gain, -1.0)):
            low, high = np.clip(estimate.bounds(0.95), least, 1.0).tolist()
            described |= {f"{name}_{what}_low": low, f"{name}_{what}_high": high}
    robust = values.get("dr")  # the better one of two that rest on the same replies
    if best := max(
        values.values(), key=lambda each: (each.effective_share, each is robust), default=None
    ):
        described["rated_effective_share"] = best.effective_share
        for whose, estimate in (("parent", best.parent), ("child", best.child)):
            described[f"{whose}_rate"] = _rate(estimate)
            described[f"{whose}_rate_error"] = estimate.standard_error
    return described


def _rate(estimate: Estimate) -> float:
    return min(max(estimate.value, 0.0), 1.0)


def are_whole(candidates: Sequence[Rollout]) -> Array:
    """Say of which candidates (M,) all others of their request are there too: one of them was shown for certain."""
    shown: dict[str, float] = defaultdict(float)
    for each in candidates:
        shown[each.response_id] += each.propensity or 0.0
    return np.array(
        [bool(c.propensity) and shown[c.response_id] > 1 - _ROUNDING for c in candidates], bool
    )


def _words(rollout: Rollout) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    """Return all that a reply's log-probability depends on, beside the policy."""
    return rollout.prompt, rollout.response, rollout.temperature


def _logged(rollouts: Sequence[Rollout]) -> Array:
    return np.array([sum(r.logprobs) for r in rollouts])
