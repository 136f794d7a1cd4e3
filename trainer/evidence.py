"""Evidence that the reward model learned something: how it ranks what it was not fitted on."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import norm, rankdata


class Evidence(NamedTuple):
    """A held-out AUROC, and its precision (1 / variance) if nothing had been learned; 0: there is none."""

    auroc: float = 0.5
    precision: float = 0.0

    @property
    def strength(self) -> float:
        """Return by how many standard errors of the null hypothesis the AUROC is above 0.5."""
        return float((self.auroc - 0.5) * self.precision**0.5)

    def lower_bound(self, confidence: float) -> float:
        """Return the one-sided lower confidence bound.

        With the variance of the null hypothesis, "above 0.5" is exactly the Mann-Whitney test, and
        a perfect AUROC on a handful of thumbs proves nothing.
        """
        return max(0.0, self.auroc - self._reach(confidence))

    def upper_bound(self, confidence: float) -> float:
        """Return the one-sided upper confidence bound."""
        return min(1.0, self.auroc + self._reach(confidence))

    def _reach(self, confidence: float) -> float:
        return float(norm.ppf(confidence) / self.precision**0.5) if self.precision else 1.0


def held_out_auroc(scores: Sequence[float], ups: Sequence[bool]) -> Evidence:
    """Compare every thumb up with every thumb down (Mann & Whitney 1947); ties count half."""
    up, down = sum(ups), len(ups) - sum(ups)
    if up == 0 or down == 0:
        return Evidence()
    rank_sum = sum(
        rank for rank, is_up in zip(rankdata(scores).tolist(), ups, strict=True) if is_up
    )
    pairs = up * down
    return Evidence(
        auroc=(rank_sum - up * (up + 1) / 2) / pairs, precision=12 * pairs / (up + down + 1)
    )


def ordered_right(margins: Sequence[float], replies: Sequence[str]) -> Evidence:
    """Judge comparisons (N,) by the better one's score minus the worse one's; ties count half.

    `replies` (N,) names the reply that each is about. Several of one reply may all say the same thing:
    they count as if they did, so that the variance is at most this.
    """
    if not margins:
        return Evidence()
    right = sum(0.5 * (1 + (margin > 0) - (margin < 0)) for margin in margins)
    of_a_reply = Counter(replies).values()
    return Evidence(right / len(margins), 4 * len(margins) ** 2 / sum(n**2 for n in of_a_reply))


def pool(parts: Sequence[Evidence]) -> Evidence:
    """Combine independent strata by their precision: scores of different reward models are never compared."""
    precision = sum(part.precision for part in parts)
    if precision == 0:
        return Evidence()
    return Evidence(sum(part.precision * part.auroc for part in parts) / precision, precision)


def pool_folds(parts: Sequence[Evidence]) -> Evidence:
    """Combine the folds of one cross-fit.

    What two judgements of different folds have in common by chance counts twice, as one teaches and the other
    asks, and the other way round: their sum has up to twice the variance of independent strata (Bengio &
    Grandvalet 2004, JMLR 5, on why the folds' own spread does not tell).
    """
    pooled = pool(parts)
    return pooled._replace(precision=pooled.precision / 2)
