"""What a canary's users say of it beside the others: an anytime-valid test, and what it comes to.

Users are the unit: each gives one value in [0, 1] to a measure, however many thumbs come from it, and
what a user has said once does not change. They are put in order of arrival and into blocks that end as
soon as both sides have a user: the control is concurrent, and what a day does to everybody's thumbs it
does to both. Where the canary's mean is no higher, the difference of a block's means has expectation 0
or less, whatever came before; a bet on it is then a losing game, and what it wins is evidence: an
e-process, which may be looked at after every thumb (Shekhar & Ramdas 2023, "Nonparametric two-sample
testing by betting"; bets on bounded means: Waudby-Smith & Ramdas 2024, "Estimating means of bounded
random variables by betting", section 4).

Thumbs compare versions only where both are rated by the same kind of users. If one is rated less often,
those who rate it are others; so nothing is promoted where the sides of those who rated, in order, are
not drawn by the share (sample ratio mismatch: Lindon & Malek 2022, "Anytime-valid inference for
multinomial count data").
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

THUMBS = "thumbs"
"""The measure that promotes; all others are guards, of which higher is worse."""
LENGTH = "length"
"""The guard that looks both ways: short replies are as bad a sign as long ones."""
_BETS = (np.arange(64) + 0.5) / 64
"""Shares of the capital, an equal part of it put on each for good: a mixture has no setting to tune."""


class Vote(NamedTuple):
    """What one user says of a measure, 0 to 1; in order of the users' arrival in the trial.

    It is fixed when it comes in: of a thumb that is changed later, what was said first.
    """

    is_canary: bool
    value: float


class Evidence(NamedTuple):
    """Users on both sides with their mean, and the most that bets on either side have won, as logs.

    `log_held` is what the bets on a higher mean hold now: less than they won, where users changed their minds.
    """

    canary_users: int
    current_users: int
    canary_mean: float
    current_mean: float
    log_higher: float
    log_lower: float
    log_held: float

    def plain(self) -> dict[str, float | None]:
        """Return it by name, as JSON takes it: None where there is no user."""
        return {
            name: None if math.isnan(value) else value for name, value in self._asdict().items()
        }


class Block(NamedTuple):
    """A full block: after how many votes, and mean of the canary minus mean of the current version."""

    votes: int
    difference: float


@dataclass(frozen=True, slots=True)
class Terms:
    """What a trial is decided by, fixed when it begins: a test whose terms move proves nothing.

    `share` of the users have the canary. `horizon` in users of the canary who rated; times in seconds.
    `margins` are how much higher each guard's mean may be; `max_corrupted` how many replies may be.
    Replies are measured by `typical_s`, `typical_tokens` and `refusal_pattern`, see guards.
    """

    share: float
    promote_alpha: float
    roll_back_alpha: float
    horizon: int
    min_time_s: float
    max_time_s: float
    guard_alpha: float
    margins: Mapping[str, float]
    max_corrupted: int
    typical_s: float
    typical_tokens: float
    refusal_pattern: str


class Verdict(StrEnum):
    """What a trial comes to."""

    PROMOTE = "promote"
    ROLL_BACK = "roll_back"
    WAIT = "wait"
    UNDECIDED = "undecided"


class Ruling(NamedTuple):
    """A verdict, and why, in words."""

    verdict: Verdict
    reason: str


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


def log_evidence(
    differences: Sequence[float] | NDArray[np.float64], margin: float = 0.0
) -> NDArray[np.float64]:
    """Return the log of the most a bet on differences (D,) above a margin has won of a stake of 1.

    The result has it after each difference. By Ville's inequality it ever reaches log(1 / alpha) with
    probability alpha at most, where their expectation is not above the margin, which is in [0, 1].
    """
    return _most(log_capital(differences, margin))


def log_capital(
    differences: Sequence[float] | NDArray[np.float64], margin: float = 0.0
) -> NDArray[np.float64]:
    """Return the log of what the same bet holds after each of the differences (D,), of a stake of 1."""
    payoffs = (np.asarray(differences, float) - margin) / (1 + margin)  # at least -1
    capital = np.log1p(np.outer(_BETS, payoffs)).cumsum(axis=1)  # (bets, D)
    worth: NDArray[np.float64] = np.logaddexp.reduce(capital) - math.log(len(_BETS))
    return worth


def _most(capital: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the most that a bet has held so far, at least its stake."""
    return np.maximum.accumulate(capital.clip(min=0.0))


def log_mismatch(
    are_canary: Sequence[bool] | NDArray[np.bool_], share: float
) -> NDArray[np.float64]:
    """Return the log of the most a bet has won on sides (N,) that are no draws with this probability.

    The result has it after each side. The bet is on the next one by the share so far, (1 + count) /
    (2 + N): Laplace's rule, a uniform mixture of all shares. It is an e-process as above.
    """
    sides = np.asarray(are_canary, bool)
    before = sides.cumsum() - sides
    guess = (before + 1) / (np.arange(len(sides)) + 2)
    odds = np.where(sides, guess / share, (1 - guess) / (1 - share))
    return _most(np.log(odds).cumsum())


def weigh(votes: Sequence[Vote], margin: float = 0.0) -> Evidence:
    """Return what the votes say so far of a mean that is higher, or lower, by more than the margin."""
    values = {side: [v.value for v in votes if v.is_canary is side] for side in (True, False)}
    found = np.array([block.difference for block in blocks_of(votes)])
    higher = log_capital(found, margin)
    return Evidence(
        canary_users=len(values[True]),
        current_users=len(values[False]),
        canary_mean=_mean(values[True]),
        current_mean=_mean(values[False]),
        log_higher=last(_most(higher)),
        log_lower=last(log_evidence(-found, margin)),
        log_held=last(higher),
    )


def judge(
    evidence: Mapping[str, Evidence],
    terms: Terms,
    *,
    corrupted: int = 0,
    mismatch: float = 0.0,
    age_s: float = 0.0,
) -> Ruling:
    """Return what to do, asked as often as anybody likes; `evidence` by measure, THUMBS among them.

    An equal or worse canary is promoted with probability `promote_alpha` at most, an equal or better
    one rolled back by its thumbs with `roll_back_alpha`, and by each guard that it keeps within its
    margin with `guard_alpha`. What counts for a promotion is what the bets hold when it is asked, which
    errs no more often: what users liked before the shortest time was over, and do not any more, promotes
    nothing. After the horizon or the longest time it stays undecided, and where the
    sides are rated by different users, see log_mismatch, which errs with `guard_alpha`, too.
    """
    if corrupted > terms.max_corrupted:
        return Ruling(Verdict.ROLL_BACK, f"corrupted: {corrupted} replies")
    thumbs = evidence[THUMBS]
    words = f"{THUMBS}: {_words(thumbs)}"
    if thumbs.log_lower >= -math.log(terms.roll_back_alpha):
        return Ruling(Verdict.ROLL_BACK, words)
    for name, found in evidence.items():
        if name != THUMBS and _trips(name, found, terms):
            return Ruling(Verdict.ROLL_BACK, f"{name}: {_words(found)}")
    if mismatch >= -math.log(terms.guard_alpha):
        return Ruling(Verdict.UNDECIDED, f"undecided: the two are not rated alike; {words}")
    is_early = age_s < terms.min_time_s
    if thumbs.log_held >= -math.log(terms.promote_alpha):
        return Ruling(Verdict.WAIT if is_early else Verdict.PROMOTE, words)
    if (thumbs.canary_users >= terms.horizon and not is_early) or age_s >= terms.max_time_s:
        return Ruling(Verdict.UNDECIDED, f"undecided; {words}")
    return Ruling(Verdict.WAIT, words)


def _trips(name: str, found: Evidence, terms: Terms) -> bool:
    log_worse = max(found.log_higher, found.log_lower) if name == LENGTH else found.log_higher
    return log_worse >= -math.log(terms.guard_alpha)


def _words(found: Evidence) -> str:
    return (
        f"{found.canary_mean:.3f} of {found.canary_users} users,"
        f" {found.current_mean:.3f} of the other {found.current_users}"
    )


def last(path: NDArray[np.float64]) -> float:
    """Return what a path came to; 0 where nobody has bet."""
    return float(path[-1]) if len(path) else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
