"""Whether a canary's users like its replies better than the others like theirs: an anytime-valid test.

Users are the unit: each gives one value in [0, 1] to a trial, however many thumbs come from it. They
are put in order of arrival and into blocks that end as soon as both sides have a user: the control is
concurrent, and what a day does to everybody's thumbs it does to both. Where the canary is equal or
worse, the difference of a block's means has expectation 0 or less, whatever came before; a bet on it
is then a losing game, and what it wins is evidence: an e-process, which may be looked at after every
thumb (Shekhar & Ramdas 2023, "Nonparametric two-sample testing by betting"; bets on bounded means:
Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting", section 4).
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BETS = (np.arange(64) + 0.5) / 64
"""Shares of the capital, an equal part of it put on each for good: a mixture has no setting to tune."""


class Vote(NamedTuple):
    """What one user's feedback says, 0 to 1; in order of the users' first feedback in the trial."""

    is_canary: bool
    value: float


class Verdict(StrEnum):
    """What a trial comes to."""

    PROMOTE = "promote"
    ROLL_BACK = "roll_back"
    WAIT = "wait"
    UNDECIDED = "undecided"


class Evidence(NamedTuple):
    """Users on both sides with their mean, and the most that bets on either side have won, as logs."""

    canary_users: int
    current_users: int
    canary_mean: float
    current_mean: float
    log_better: float
    log_worse: float


class Block(NamedTuple):
    """A full block: after how many votes, and mean of the canary minus mean of the current version."""

    votes: int
    difference: float


def blocks_of(votes: Sequence[Vote]) -> list[Block]:
    """Return the full blocks of the votes; differences are in [-1, 1]."""
    found: list[Block] = []
    sides: tuple[list[float], list[float]] = ([], [])
    for count, vote in enumerate(votes, 1):
        sides[vote.is_canary].append(vote.value)
        if all(sides):
            current, canary = sides
            found.append(Block(count, _mean(canary) - _mean(current)))
            sides = ([], [])
    return found


def log_evidence(differences: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the log of the most a bet on differences (D,) above 0 has won of a stake of 1, after each.

    By Ville's inequality it ever reaches log(1 / alpha) with probability alpha at most, where their
    expectation is not above 0.
    """
    capital = np.log1p(np.outer(_BETS, differences)).cumsum(axis=1)  # (bets, D)
    worth: NDArray[np.float64] = np.logaddexp.reduce(capital) - math.log(len(_BETS))
    return np.maximum.accumulate(worth.clip(min=0.0))


def weigh(votes: Sequence[Vote]) -> Evidence:
    """Return what the votes say so far."""
    values = {side: [v.value for v in votes if v.is_canary is side] for side in (True, False)}
    found = np.array([block.difference for block in blocks_of(votes)])
    return Evidence(
        canary_users=len(values[True]),
        current_users=len(values[False]),
        canary_mean=_mean(values[True]),
        current_mean=_mean(values[False]),
        log_better=_last(log_evidence(found)),
        log_worse=_last(log_evidence(-found)),
    )


def judge(
    evidence: Evidence, *, promote_alpha: float, roll_back_alpha: float, horizon: int
) -> Verdict:
    """Return what to do, asked as often as anybody likes.

    An equal or worse canary is promoted with probability `promote_alpha` at most, an equal or better
    one rolled back with `roll_back_alpha`. After `horizon` users of the canary it stays undecided.
    """
    if evidence.log_worse >= -math.log(roll_back_alpha):
        return Verdict.ROLL_BACK
    if evidence.log_better >= -math.log(promote_alpha):
        return Verdict.PROMOTE
    return Verdict.UNDECIDED if evidence.canary_users >= horizon else Verdict.WAIT


def _last(path: NDArray[np.float64]) -> float:
    return float(path[-1]) if len(path) else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
