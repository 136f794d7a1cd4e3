"""Evidence that the reward model learned something: how it ranks what it was not fitted on."""

from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import norm, rankdata


class Evidence(NamedTuple):
    """A held-out AUROC, its variance if nothing had been learned, and the up-down pairs behind it."""

    auroc: float = 0.5
    variance: float = 1.0
    pairs: float = 0.0

    def lower_bound(self, confidence: float) -> float:
        """Return the one-sided lower confidence bound.

        With the variance of the null hypothesis, "above 0.5" is exactly the Mann-Whitney test, and
        a perfect AUROC on a handful of thumbs proves nothing.
        """
        return float(self.auroc - norm.ppf(confidence) * self.variance**0.5)

    def upper_bound(self, confidence: float) -> float:
        """Return the one-sided upper confidence bound."""
        return float(self.auroc + norm.ppf(confidence) * self.variance**0.5)


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
        auroc=(rank_sum - up * (up + 1) / 2) / pairs,
        variance=(up + down + 1) / (12 * pairs),
        pairs=float(pairs),
    )


def ordered_right(margins: Sequence[float]) -> Evidence:
    """Judge comparisons by the better one's score minus the worse one's; ties count half.

    Each is a pair of its own, so that under the null hypothesis the number of right ones is binomial.
    """
    if not margins:
        return Evidence()
    right = sum(0.5 * (1 + (margin > 0) - (margin < 0)) for margin in margins)
    return Evidence(right / len(margins), 1 / (4 * len(margins)), float(len(margins)))


def pool(parts: Sequence[Evidence]) -> Evidence:
    """Combine strata by their pairs: scores of different reward models are never compared."""
    total = sum(part.pairs for part in parts)
    if total == 0:
        return Evidence()
    return Evidence(
        auroc=sum(part.pairs * part.auroc for part in parts) / total,
        variance=sum(part.pairs**2 * part.variance for part in parts) / total**2,
        pairs=total,
    )
