"""What thumbs on one policy's replies say of another policy: estimates with intervals, never a deployment.

Pure functions of arrays, N replies. A reply's cluster is, where there are many, its user, whose thumbs
are not independent of each other.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

Array = np.ndarray
_NOTHING = np.zeros(0)


class Estimate(NamedTuple):
    """A policy's thumb rate; `influence` (clusters,) is what each cluster moved it by.

    `rated` is how many clusters have ratings: those that have none lend no degree of freedom. `expected` (M,) is by
    how much what guidance could have shown is expected to move it: see `by_design`.
    """

    value: float
    influence: Array
    rated: int
    expected: Array = _NOTHING

    @property
    def standard_error(self) -> float:
        """Return the larger of what the ratings and what the design say.

        The first is the linearised standard error, clusters being independent (Liang & Zeger 1986). It does not see
        that replies which are hardly ever shown, and count the more, are missing by chance among few ratings.
        """
        if self.rated < 2:
            return float("inf")
        seen = (self.influence**2).sum() * self.rated / (self.rated - 1)
        return float(np.sqrt(max(seen, (self.expected**2).sum())))

    def minus(self, other: "Estimate") -> "Estimate":
        """Return the difference of two estimates from the same clusters and candidates: what they share cancels."""
        return Estimate(
            self.value - other.value,
            self.influence - other.influence,
            min(self.rated, other.rated),
            self.expected - other.expected,
        )

    def bounds(self, confidence: float) -> tuple[float, float]:
        """Return the two-sided interval by Student's t."""
        if self.rated < 2:
            return -float("inf"), float("inf")
        reach = float(student.ppf((1 + confidence) / 2, self.rated - 1)) * self.standard_error
        return self.value - reach, self.value + reach


class Clusters:
    """Numbers clusters, so that sums over them are arrays."""

    def __init__(self, names: Sequence[Hashable]) -> None:
        known = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self._known = known

    def sums(self, names: Sequence[Hashable], values: Array) -> Array:
        """Return the sum of the values (N,) of each cluster, whose names are (N,)."""
        places = np.array([self._known[name] for name in names], dtype=int)
        return np.bincount(places, weights=values, minlength=len(self._known))


def ratios(logprobs: Array, old_logprobs: Array, *, most: float) -> Array:
    """Return min(policy / behaviour, most) of whole responses (N,), from their log-probabilities (N,).

    Truncation trades a bias towards the behaviour for variance (Ionides 2008, JCGS 17).
    """
    return np.asarray(np.exp(np.minimum(logprobs - old_logprobs, np.log(most))))


def snips(
    weights: Array, outcomes: Array, names: Sequence[Hashable], clusters: Clusters
) -> Estimate:
    """Estimate a thumb rate from rated replies, self-normalised (Swaminathan & Joachims 2015, eq. 10).

    weights (N,): policy / behaviour probability over the propensity with which the reply was shown;
    names (N,) of the clusters.
    """
    total = weights.sum()
    value = float((weights * outcomes).sum() / total)
    influence = clusters.sums(names, weights * (outcomes - value) / total)
    return Estimate(value, influence, len(set(names)))


def doubly_robust(
    direct: Estimate,
    weights: Array,
    residuals: Array,
    names: Sequence[Hashable],
    clusters: Clusters,
) -> Estimate:
    """Correct a model's estimate by what rated replies say it is wrong by.

    Dudík et al. 2011 (arXiv 1103.4601, eq. 1), the correction self-normalised. direct: `snips` of the
    model's predictions for all candidates, rated or not; residuals (N,): thumb minus prediction. Right
    where the weights are, or where the model is.
    """
    correction = snips(weights, residuals, names, clusters)
    return Estimate(
        direct.value + correction.value, direct.influence + correction.influence, correction.rated
    )


def by_design(weights: Array, propensities: Array, *, requests: int, rated: int) -> Array:
    """Return by how much each candidate is expected to move a self-normalised estimate, for each unit that its thumb
    is away from where it is expected; the root of the squares' sum is the standard error (Owen 2013, "Monte Carlo
    theory, methods and examples", section 9.2).

    All that guidance could have shown is known, and how likely it was: weights (M,) are policy / behaviour
    probabilities of all candidates of `requests`, propensities (M,) those of showing them; `rated` replies have a
    thumb.
    """
    return np.asarray(weights / weights.sum() * np.sqrt(requests / (rated * propensities)))


def spread(predicted: Array) -> Array:
    """Return the standard deviations (M,) of thumbs that are up with these probabilities (M,)."""
    return np.asarray(np.sqrt(predicted * (1 - predicted)))


def moves_of_rate(moves: Array, predicted: Array, value: float) -> Array:
    """Return `expected` (2 M,) of an estimated rate: a thumb differs from what is predicted (M,), which differs from
    the rate. The latter has a sign, so that two policies' estimates of the same replies can be subtracted.
    """
    return np.concatenate([moves * spread(predicted), moves * (predicted - value)])


def effective_share(weights: Array) -> float:
    """Return Kish's effective share of the replies, in (0, 1]; 0 where no reply has any weight."""
    if not weights.any():
        return 0.0
    return float(weights.sum() ** 2 / ((weights**2).sum() * len(weights)))
