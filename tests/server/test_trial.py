"""The test of a canary: hand-worked numbers, and what has to hold whatever users do."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.trial import (
    THUMBS,
    Evidence,
    Verdict,
    Vote,
    blocks_of,
    judge,
    last,
    log_evidence,
    log_mismatch,
    weigh,
)
from tests.rows import TERMS

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
    assert weigh([]).log_higher == 0


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
    assert one.log_higher == pytest.approx(other.log_lower)
    assert one.log_lower == pytest.approx(other.log_higher)
    assert one.canary_users + one.current_users == len(votes)


@given(VOTES, st.booleans())
def test_nobody_who_is_alone_on_a_side_decides_anything(votes: list[Vote], is_canary: bool):
    alone = [vote._replace(is_canary=is_canary) for vote in votes]
    evidence = weigh(alone)
    assert (evidence.log_higher, evidence.log_lower) == (0, 0)


def test_means_are_those_of_users():
    evidence = weigh([*canary(1, 0.5), *current(0)])
    assert evidence[:4] == (2, 1, 0.75, 0.0)
    assert math.isnan(weigh(canary(1)).current_mean)


@given(VOTES, VOTES)
def test_what_was_said_is_not_changed_by_what_is_said_later(votes: list[Vote], later: list[Vote]):
    blocks = blocks_of(votes)
    assert blocks_of(votes + later)[: len(blocks)] == blocks
    before, after = weigh(votes), weigh(votes + later)
    assert after.log_higher >= before.log_higher
    assert after.log_lower >= before.log_lower


def test_a_bet_against_a_margin_wins_only_beyond_it():
    # Differences of 1 against a margin of 1/2 pay (1 - 1/2) / (1 + 1/2) = 1/3 of what is put on them:
    # one makes 1 + 1/3 * 1/2 = 7/6 of a stake that is spread over all shares.
    assert math.exp(log_evidence(np.ones(1), 0.5)[-1]) == pytest.approx(7 / 6)
    assert not log_evidence(np.full(50, 0.5), 0.5).any()
    assert weigh([*canary(0.9), *current(0.5)] * 40, margin=0.4).log_higher == pytest.approx(0)
    assert weigh([*canary(0.9), *current(0.4)] * 400, margin=0.4).log_higher > 1


def test_a_bet_on_who_rates_is_worth_the_odds():
    # Two of the canary's in a row: bets of 1/2 and 2/3 against a share of 1/4.
    assert math.exp(log_mismatch([True, True], 0.25)[-1]) == pytest.approx(
        (1 / 2) * (2 / 3) / (1 / 16)
    )
    assert last(log_mismatch([], 0.25)) == 0
    rng = np.random.default_rng(0)
    assert last(log_mismatch(rng.random(2000) < 0.2, 0.2)) < math.log(20)
    assert last(log_mismatch(rng.random(2000) < 0.1, 0.2)) > math.log(1000)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_where_sides_are_drawn_by_the_share_the_bet_is_fair(share: float):
    worth = 0.0
    for course in itertools.product((True, False), repeat=6):
        probability = math.prod(share if side else 1 - share for side in course)
        odds = 1.0
        for n, side in enumerate(course):
            guess = (1 + sum(course[:n])) / (2 + n)
            odds *= guess / share if side else (1 - guess) / (1 - share)
        worth += probability * odds
        assert last(log_mismatch(course, share)) >= max(math.log(odds), 0) - 1e-12
    assert worth == pytest.approx(1)


def found(higher: float = 1, lower: float = 1, users: int = 10) -> Evidence:
    """Return evidence of stakes that were worth so much."""
    return Evidence(
        users, 90, 0.5, 0.25, math.log(higher), math.log(lower), log_held=math.log(higher)
    )


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
    ruling = judge({THUMBS: found(better, worse, users)}, TERMS, age_s=60.0)
    assert ruling.verdict is verdict
    undecided = "undecided; " if verdict is Verdict.UNDECIDED else ""
    words = f"thumbs: 0.500 of {users} users, 0.250 of the other 90"
    assert ruling.reason == undecided + words


def test_nothing_is_promoted_before_its_time_and_nothing_waits_for_ever():
    good, none = {THUMBS: found(21)}, {THUMBS: found()}
    assert judge(good, TERMS, age_s=59.0).verdict is Verdict.WAIT
    assert judge(good, TERMS, age_s=61.0).verdict is Verdict.PROMOTE
    many = {THUMBS: found(users=100)}
    assert judge(many, TERMS, age_s=59.0).verdict is Verdict.WAIT  # the horizon waits, too
    assert judge(many, TERMS, age_s=61.0).verdict is Verdict.UNDECIDED
    assert judge({THUMBS: found(21, users=100)}, TERMS, age_s=59.0).verdict is Verdict.WAIT
    assert judge(none, TERMS, age_s=3599.0).verdict is Verdict.WAIT
    assert judge(none, TERMS, age_s=3600.0).verdict is Verdict.UNDECIDED
    assert judge({THUMBS: found(1, 11)}, TERMS, age_s=0.0).verdict is Verdict.ROLL_BACK


def test_what_was_liked_while_it_was_new_and_is_not_any_more_is_not_promoted():
    """In the first hour it is liked at 0.9 beside 0.5, for the rest of the day at 0.45."""
    rng = np.random.default_rng(0)

    def rated(users: int, canary_rate: float) -> list[Vote]:
        sides = rng.random(users) < 0.2
        rates = np.where(sides, canary_rate, 0.5)
        return [Vote(bool(s), float(rng.random() < r)) for s, r in zip(sides, rates, strict=True)]

    terms = replace(TERMS, horizon=10_000)
    first_hour = rated(400, 0.9)
    hyped = weigh(first_hour)
    assert judge({THUMBS: hyped}, terms, age_s=61.0).verdict is Verdict.PROMOTE
    day = weigh([*first_hour, *rated(4000, 0.45)])
    assert day.log_higher > math.log(1000)
    assert judge({THUMBS: day}, terms, age_s=61.0).verdict is Verdict.WAIT


@pytest.mark.parametrize(
    ("guard", "higher", "lower", "trips"),
    [
        ("errors", 101, 1, True),
        ("errors", 99, 1, False),
        ("errors", 1, 101, False),  # fewer errors are no reason
        ("length", 101, 1, True),
        ("length", 1, 101, True),  # shorter replies are
        ("length", 99, 99, False),
    ],
)
def test_a_guard_rolls_back_whatever_the_thumbs_say(
    guard: str, higher: float, lower: float, trips: bool
):
    evidence = {THUMBS: found(1e6), guard: found(higher, lower)}
    ruling = judge(evidence, TERMS, age_s=61.0)
    assert ruling.verdict is (Verdict.ROLL_BACK if trips else Verdict.PROMOTE)
    assert ruling.reason.startswith(guard if trips else "thumbs")


def test_corrupted_replies_need_no_test():
    assert judge({THUMBS: found(1e6)}, TERMS, corrupted=1, age_s=61.0).verdict is Verdict.PROMOTE
    ruling = judge({THUMBS: found(1e6)}, TERMS, corrupted=2, age_s=61.0)
    assert ruling == (Verdict.ROLL_BACK, "corrupted: 2 replies")


def test_versions_that_are_not_rated_alike_are_not_compared():
    ruling = judge({THUMBS: found(1e6)}, TERMS, mismatch=math.log(101), age_s=61.0)
    assert ruling.verdict is Verdict.UNDECIDED
    assert ruling.reason.startswith("undecided: the two are not rated alike; thumbs: ")
    assert judge({THUMBS: found(1, 11)}, TERMS, mismatch=9.0).verdict is Verdict.ROLL_BACK
