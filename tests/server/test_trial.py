"""The test of a canary: hand-worked numbers, and what has to hold whatever users do."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.trial import Evidence, Verdict, Vote, blocks_of, judge, log_evidence, weigh

VOTES = st.lists(st.builds(Vote, st.booleans(), st.floats(0, 1)), max_size=60)


def canary(*values: float) -> list[Vote]:
    return [Vote(True, value) for value in values]


def current(*values: float) -> list[Vote]:
    return [Vote(False, value) for value in values]


def test_a_block_ends_as_soon_as_both_sides_have_a_user():
    votes = [*current(1, 0, 0.5), *canary(1), *canary(0, 1), *current(1), *current(0)]
    assert blocks_of(votes) == [(4, 0.5), (7, -0.5)]  # the last user's block is not full


def test_what_a_bet_wins_on_users_who_all_prefer_the_canary():
    # A share l of the capital on each of n differences of 1 makes (1 + l) ** n of it; over all shares
    # in (0, 1) that is (2 ** (n + 1) - 1) / (n + 1) on average: 1.5 for one, 186.1 for ten.
    assert math.exp(log_evidence(np.ones(1))[-1]) == pytest.approx(1.5)
    assert math.exp(log_evidence(np.ones(10))[-1]) == pytest.approx(2047 / 11, rel=2e-3)


def test_users_who_all_prefer_the_current_version_win_nothing():
    assert not log_evidence(-np.ones(30)).any()
    assert log_evidence(np.array([])).tolist() == []
    assert weigh([]).log_better == 0


def test_evidence_once_won_is_not_lost_by_looking_later():
    won = log_evidence(np.ones(8))[-1]
    path = log_evidence(np.concatenate([np.ones(8), -np.ones(40)]))
    assert path[7] == path[-1] == won


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_of_an_equal_canary_the_bets_are_fair(rate: float):
    """Every course of six pairs of users, weighted by its probability: a stake of 1 is worth 1."""
    steps = {1: rate * (1 - rate), 0: rate**2 + (1 - rate) ** 2, -1: rate * (1 - rate)}
    worth = crossed = 0.0
    for course in itertools.product(steps, repeat=6):
        probability = math.prod(steps[step] for step in course)
        shares = (np.arange(64) + 0.5) / 64
        worth += probability * np.prod(1 + np.outer(shares, course), axis=1).mean()
        crossed += probability * (log_evidence(np.array(course, float))[-1] >= math.log(4))
    assert worth == pytest.approx(1)
    assert crossed <= 1 / 4


@given(VOTES)
def test_what_speaks_for_one_side_speaks_against_the_other(votes: list[Vote]):
    one = weigh(votes)
    other = weigh([Vote(not vote.is_canary, vote.value) for vote in votes])
    assert one.log_better == pytest.approx(other.log_worse)
    assert one.log_worse == pytest.approx(other.log_better)
    assert one.canary_users + one.current_users == len(votes)


@given(VOTES, st.booleans())
def test_nobody_who_is_alone_on_a_side_decides_anything(votes: list[Vote], is_canary: bool):
    alone = [vote._replace(is_canary=is_canary) for vote in votes]
    evidence = weigh(alone)
    assert (evidence.log_better, evidence.log_worse) == (0, 0)


def test_means_are_those_of_users():
    evidence = weigh([*canary(1, 0.5), *current(0)])
    assert evidence[:4] == (2, 1, 0.75, 0.0)
    assert math.isnan(weigh(canary(1)).current_mean)


@pytest.mark.parametrize(
    ("better", "worse", "users", "verdict"),
    [
        (21, 1, 10, Verdict.PROMOTE),
        (19, 1, 10, Verdict.WAIT),
        (19, 1, 100, Verdict.UNDECIDED),
        (21, 1, 100, Verdict.PROMOTE),
        (1, 11, 10, Verdict.ROLL_BACK),
        (1, 9, 10, Verdict.WAIT),
        (21, 11, 10, Verdict.ROLL_BACK),  # both: what is in doubt is not promoted
    ],
)
def test_a_verdict_is_by_the_stake_that_was_won(
    better: float, worse: float, users: int, verdict: Verdict
):
    evidence = Evidence(users, users, 0.5, 0.5, math.log(better), math.log(worse))
    assert judge(evidence, promote_alpha=0.05, roll_back_alpha=0.1, horizon=100) is verdict
