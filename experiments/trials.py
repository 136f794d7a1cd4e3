"""The test of a canary on simulated users, looked at after every thumb.

It shows how often the test errs, and how long it takes. A user has a taste: how likely a thumb up is,
whatever the version, to which the version adds. Few users give most of the thumbs. Two controls err: one
takes every thumb for a user of its own; in the other those who rate much like more and the canary is rated
less often, so that others rate it, and the test does not ask who they are.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from matplotlib.axes import Axes
from scipy import stats

from experiments.options import FOLDER, Folder
from experiments.report import CONFIDENCE, console, draw, write
from server.trial import Verdict, Vote, blocks_of, log_evidence, log_mismatch

USERS = 4000
RATE = 0.5
"""How often the current version's replies are liked."""
TASTE = 2.0
"""Sum of the two parameters of the Beta distribution of users' tastes."""
TAIL = 1.1
"""Exponent of the Pareto distribution of users' thumbs: one user in a thousand gives most of them."""
THUMBS = 40_000
SHARE = 0.2
"""Of the users, whom the canary answers."""
HORIZON = 400
"""Users of the canary after whom a trial ends."""
ALPHA = 0.05
GUARD_ALPHA = 0.001
STEPS = (0.0, -0.05, -0.15, 0.15)
"""What the canary's rate is above the current version's."""


class Kind(NamedTuple):
    """What a canary is like, and how it is judged.

    `step` is added to its rate; its users rate so much as often as the others (`rated`). `by_activity`:
    who rates more likes more. `by_thumb` and `asks_who` are the controls.
    """

    step: float
    rated: float = 1.0
    by_activity: bool = False
    by_thumb: bool = False
    asks_who: bool = True


KINDS = {f"{step:+.2f}": Kind(step) for step in STEPS} | {
    "+0.00, rated half as often": Kind(0.0, rated=0.5, by_activity=True),
    "+0.00, rated a quarter as often": Kind(0.0, rated=0.25, by_activity=True),
    "+0.00, rated half as often, nobody asks who": Kind(
        0.0, rated=0.5, by_activity=True, asks_who=False
    ),
    "+0.00, rated a quarter as often, nobody asks who": Kind(
        0.0, rated=0.25, by_activity=True, asks_who=False
    ),
    "+0.00, every thumb a user": Kind(0.0, by_thumb=True, asks_who=False),
}


class Thumbs(NamedTuple):
    """Thumbs in order: whose (K,), and whether they were up (K,); and each user's side (U,)."""

    users: np.ndarray
    is_up: np.ndarray
    is_canary: np.ndarray


class Course(NamedTuple):
    """How a trial went: its end, after how many thumbs and users on both sides."""

    verdict: Verdict
    thumbs: int
    users: int


def draw_thumbs(rng: np.random.Generator, kind: Kind, count: int) -> Thumbs:
    """Return thumbs of users of whom the canary's like it by a step more, or less."""
    activity = rng.pareto(TAIL, USERS) + 1
    is_canary = rng.random(USERS) < SHARE
    weights = np.where(is_canary, kind.rated, 1.0) * activity
    users = rng.choice(USERS, size=count, p=weights / weights.sum())
    taste = rng.beta(RATE * TASTE, (1 - RATE) * TASTE, USERS)
    if kind.by_activity:
        taste = 0.1 + 0.8 * activity.argsort().argsort() / USERS
    step = kind.step
    moved = taste + step * (1 - taste) / (1 - RATE) if step > 0 else taste * (1 + step / RATE)
    likes = np.where(is_canary, moved, taste)
    return Thumbs(users, rng.random(count) < likes[users], is_canary)


def votes_of(thumbs: Thumbs, *, by_thumb: bool) -> tuple[list[Vote], list[int]]:
    """Return the votes, and after which thumb each came: a user's first, or with `by_thumb` all."""
    _, first = np.unique(thumbs.users, return_index=True)
    chosen = np.arange(len(thumbs.users)) if by_thumb else np.sort(first)
    votes = [Vote(bool(thumbs.is_canary[thumbs.users[i]]), float(thumbs.is_up[i])) for i in chosen]
    return votes, [int(i) + 1 for i in chosen]


def follow(votes: Sequence[Vote], *, asks_who: bool = True) -> tuple[Verdict, int]:
    """Return the first verdict that judge() gives on ever more of the votes, and after how many."""
    sides = np.array([vote.is_canary for vote in votes])
    last = int(np.searchsorted(sides.cumsum(), HORIZON)) + 1  # the vote that reaches the horizon
    blocks = blocks_of(votes[:last])
    found = np.array([block.difference for block in blocks])
    after = np.array([block.votes for block in blocks])
    mismatch = math.inf
    if asks_who:
        mismatch = _first(np.arange(len(sides)) + 1, log_mismatch(sides, SHARE), GUARD_ALPHA)
    ends = [  # in the order in which judge() asks
        (_first(after, log_evidence(-found), ALPHA), Verdict.ROLL_BACK),
        (mismatch, Verdict.UNDECIDED),
        (_first(after, log_evidence(found), ALPHA), Verdict.PROMOTE),
        (last, Verdict.UNDECIDED),
    ]
    count, verdict = min(ends, key=lambda end: end[0])
    if count > len(votes):
        return Verdict.WAIT, len(votes)
    return verdict, int(count)


def _first(after: np.ndarray, path: np.ndarray, alpha: float) -> float:
    """Return after how many votes a path reaches log(1 / alpha)."""
    reached = np.flatnonzero(path >= -math.log(alpha))
    return float(after[reached[0]]) if len(reached) else math.inf


def run(seed: int, kind: Kind) -> Course:
    """Return how one trial went."""
    thumbs = draw_thumbs(np.random.default_rng(seed), kind, THUMBS)
    votes, after = votes_of(thumbs, by_thumb=kind.by_thumb)
    verdict, count = follow(votes, asks_who=kind.asks_who)
    return Course(verdict, after[count - 1], count)


def fixed_users(step: float) -> float:
    """Return how many users a test with one look at its end needs, both sides together.

    The normal approximation for two proportions, one-sided, with a power of 1 - ALPHA (Fleiss, Levin &
    Paik 2003, "Statistical Methods for Rates and Proportions", chapter 4).
    """
    quantile = float(stats.norm.ppf(1 - ALPHA))
    other = RATE + step
    variance = other * (1 - other) / SHARE + RATE * (1 - RATE) / (1 - SHARE)
    return (2 * quantile) ** 2 * variance / step**2


def summarise(courses: Sequence[Course]) -> dict[str, Any]:
    """Return shares of verdicts with exact 95 % intervals, and what the decided trials took."""
    report: dict[str, Any] = {}
    for verdict in (Verdict.PROMOTE, Verdict.ROLL_BACK, Verdict.UNDECIDED):
        count = sum(course.verdict is verdict for course in courses)
        exact = stats.binomtest(count, len(courses)).proportion_ci(CONFIDENCE)
        report[verdict.value] = {
            "share": count / len(courses),
            "low": float(exact.low),
            "high": float(exact.high),
        }
    decided = [c for c in courses if c.verdict in (Verdict.PROMOTE, Verdict.ROLL_BACK)]
    report["median_users"] = median(c.users for c in decided) if decided else None
    report["median_thumbs"] = median(c.thumbs for c in decided) if decided else None
    return report


def main(
    runs: Annotated[int, typer.Option(min=1, help="Trials of each kind.")] = 2000,
    folder: Folder = FOLDER,
) -> None:
    """A canary as good, worse or better: what the test makes of it, and when."""
    report: dict[str, Any] = {}
    for name, kind in KINDS.items():
        courses = [run(seed, kind) for seed in range(runs)]
        found = report[name] = summarise(courses)
        if kind.step:
            found["fixed_users"] = fixed_users(kind.step)
        shares = ", ".join(
            f"{verdict} {found[verdict]['share']:.3f}"
            f" ({found[verdict]['low']:.3f} to {found[verdict]['high']:.3f})"
            for verdict in ("promote", "roll_back", "undecided")
        )
        took = f"{found['median_users']} users, {found['median_thumbs']} thumbs"
        console.print(f"{name}: {shares}; median {took}")
    write(folder, "trials", {"runs": runs, "kinds": report})
    draw(folder, "trials", lambda axes: _plot(axes, report))


def _plot(axes: Axes, report: dict[str, Any]) -> None:
    names = list(report)
    left = np.zeros(len(names))
    for verdict in ("promote", "undecided", "roll_back"):
        shares = np.array([report[name][verdict]["share"] for name in names])
        axes.barh(names, shares, left=left, label=verdict)
        left += shares
    axes.set(xlabel="share of trials")
    axes.legend()
