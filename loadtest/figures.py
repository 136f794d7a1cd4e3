"""From repeated measurements to figures with intervals, and the table that shows them."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

_CONFIDENCE = 0.95
_RESAMPLES = 2000


class Figure(NamedTuple):
    """One figure. Of k repeats, the interval is their range: it holds the true median with
    probability 1 - 2 ** (1 - k), 0.94 for five. Of resampled requests it is a bootstrap's, 95 %.
    """

    value: float
    low: float
    high: float

    def rounded(self) -> dict[str, float]:
        """Return the figure for a report."""
        return {name: round(float(value), 4) for name, value in self._asdict().items()}


class Goal(NamedTuple):
    """What a figure should reach."""

    bound: float
    is_upper: bool = False

    def __str__(self) -> str:
        return f"{'at most' if self.is_upper else 'at least'} {self.bound:g}"

    def is_met(self, figure: Figure) -> bool:
        """Say whether the figure reaches it."""
        return figure.value <= self.bound if self.is_upper else figure.value >= self.bound


def exactly(value: float) -> Figure:
    """Return a count, or a mean that is shown without an interval."""
    return Figure(value, value, value)


def of_repeats(values: Sequence[float]) -> Figure:
    """Return the median of repeats and their range."""
    return Figure(median(values), min(values), max(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Return the median over repeats of one throughput over another's, measured in turn."""
    return of_repeats([a / b for a, b in zip(ours, theirs, strict=True)])


class Group(NamedTuple):
    """One request's rewards: of the reply that was shown, and the mean of all n candidates."""

    chosen: float
    mean: float


def gain(full: Sequence[Group]) -> float:
    """Return the mean of what choosing brought, E[chosen] - E[mean], reward units."""
    return float(np.mean([g.chosen - g.mean for g in full]))


def gain_kept(full: Sequence[Group | None], chosen: Sequence[float | None]) -> Figure:
    """Return the share of the full groups' gain that another way of choosing keeps.

    `chosen` holds its rewards for the same prompts, in order. A prompt that has no reward on one of the
    sides is left out on both. Its own candidates' mean is not asked for: where losers were aborted, the
    mean of the others is not the policy's.
    """
    both = [
        (group.chosen, group.mean, reward)
        for group, reward in zip(full, chosen, strict=True)
        if group is not None and reward is not None
    ]

    def share(shown: np.ndarray, mean: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
        middle = mean.mean(axis)
        kept: np.ndarray = (other.mean(axis) - middle) / (shown.mean(axis) - middle)
        return kept

    return _resampled(np.array(both).T, share)


def share_of(some: Sequence[float], whole: Sequence[float]) -> Figure:
    """Return what one way of answering spent over what another spent on the same prompts, in all."""

    def share(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        spent: np.ndarray = a.sum(axis) / b.sum(axis)
        return spent

    return _resampled(np.array([some, whole]), share)


def _resampled(data: np.ndarray, statistic: Callable[..., np.ndarray]) -> Figure:
    """Return a statistic of paired samples, the rows of `data` (K, requests), and its interval."""
    found = bootstrap(
        tuple(data),
        statistic,
        paired=True,
        n_resamples=_RESAMPLES,
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Figure(float(statistic(*data)), float(found.low), float(found.high))


def table(figures: Mapping[str, Mapping[str, Figure]], goals: Mapping[str, Goal]) -> str:
    """Return the figures as a Markdown table: `figures[dtype][key]`, those with a goal first."""
    dtypes = list(figures)
    keys = list(dict.fromkeys([*goals, *(key for of in figures.values() for key in of)]))
    lines = [
        f"| figure | goal | {' | '.join(dtypes)} |",
        f"|---|---|{'---|' * len(dtypes)}",
    ]
    for key in keys:
        goal = goals.get(key)
        cells = [_cell(figures[dtype].get(key), goal) for dtype in dtypes]
        lines.append(f"| `{key}` | {goal or ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figure: Figure | None, goal: Goal | None) -> str:
    if figure is None:
        return "not measured"
    value, low, high = (f"{x:.3g}" for x in figure)
    interval = "" if low == high == value else f" ({low} to {high})"
    short = " **short**" if goal is not None and not goal.is_met(figure) else ""
    return f"{value}{interval}{short}"
