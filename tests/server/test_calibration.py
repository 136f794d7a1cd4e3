"""What audits say about waves and checkpoints, and how many candidates can be afforded."""

import math
from dataclasses import replace

import pytest

from server.calibration import VERSIONS, Calibration, affordable, rank_correlation
from server.guidance import Choice, Outcome
from tests.rows import candidate
from thumbloop.config.server import Checkpoint, Guidance
from thumbloop.types import Arm, Candidate, Extent

CHOICE = Choice(4, 0.5, 0.03)
SETTINGS = Guidance(
    min_audits=3,
    first_wave=2,
    checkpoints=(Checkpoint(at=0.25, keep=0.5), Checkpoint(at=0.5, keep=0.25)),
)


def audited(
    rewards: list[float], stages: list[tuple[float, ...]] | None = None, tokens: int = 20
) -> Outcome:
    stages = stages or [()] * len(rewards)
    candidates = tuple(
        candidate(
            i,
            reward=reward,
            stage_rewards=stage,
            token_ids=(9,) * tokens,
            logprobs=(-1.0,) * tokens,
        )
        for i, (reward, stage) in enumerate(zip(rewards, stages, strict=True))
    )
    return Outcome(candidates, Arm.AUDIT, reranked=True)


def planned(calibration: Calibration, version: int = 1, n: int = 4, in_flight: int = 0) -> Choice:
    return calibration.plan(version, Choice(n, 0.5, 0.03), 64, in_flight)[0]


def test_before_any_audit_there_is_one_wave_and_checkpoints_count_from_the_token_limit():
    choice = planned(Calibration(SETTINGS, 64))
    assert choice.first_wave == 0
    assert [(c.tokens, c.keep, c.prunes) for c in choice.checkpoints] == [
        (16, 2, True),
        (32, 1, True),
    ]


def test_checkpoints_follow_the_length_that_replies_have():
    calibration = Calibration(SETTINGS, 64)
    calibration.observe(1, CHOICE, audited([1.0, 2.0], tokens=20), 0.1)
    assert [c.tokens for c in planned(calibration).checkpoints] == [5, 10]


@pytest.mark.parametrize("selected", ["pruned", "cut"])
def test_requests_of_which_a_part_was_left_out_say_nothing(selected):
    calibration = Calibration(SETTINGS, 64)
    for _ in range(5):
        calibration.observe(1, CHOICE, replace(audited([1.0, 2.0]), selected=selected), 9.9)
    assert planned(calibration) == planned(Calibration(SETTINGS, 64))


def test_a_new_version_goes_on_with_lengths_and_correlations_but_not_with_rewards():
    calibration = Calibration(SETTINGS, 64)
    looked = planned(calibration)
    stages = [(3.0, 0.0), (0.0, 1.0), (2.0, 2.0), (1.0, 3.0)]
    for _ in range(3):
        calibration.observe(1, looked, audited([0.0, 1.0, 2.0, 3.0], stages), 0.1)
    assert planned(calibration).first_wave == 2
    heir = planned(calibration, version=2)
    assert heir.first_wave == 0
    assert [(c.tokens, c.prunes) for c in heir.checkpoints] == [(5, False), (10, True)]


def test_of_correlations_a_new_version_takes_no_more_than_decide():
    calibration = Calibration(SETTINGS, 64)
    looked, finals = planned(calibration), [0.0, 1.0, 2.0, 3.0]
    for _ in range(30):
        calibration.observe(1, looked, audited(finals, [(f,) for f in finals]), 0.1)
    looked = planned(calibration, version=2)
    for _ in range(4):
        calibration.observe(2, looked, audited(finals, [(-f,) for f in finals]), 0.1)
    assert calibration.correlation(2, 0) == pytest.approx((3 - 4) / 7)
    assert not calibration.is_pruning(2, 0)


def test_only_the_last_versions_are_remembered():
    calibration = Calibration(SETTINGS, 64)
    for version in range(3 * VERSIONS):
        planned(calibration, version)
    assert len(calibration._recent) == VERSIONS


def test_how_long_a_request_may_take_goes_by_its_length():
    calibration = Calibration(SETTINGS, 64)
    for _ in range(3):
        calibration.observe(1, CHOICE, audited([1.0, 2.0], tokens=50), 5.0)  # 0.1 s a token
    hurried = Choice(4, 0.5, 0.03, time_limit_s=2.0)
    assert calibration.plan(1, hurried, 64, 0)[0].num_candidates == 1  # 50 tokens need 5 s
    assert calibration.plan(1, hurried, 10, 0) == (
        planned_for(calibration, hurried, 10),
        "requested",
    )


def test_a_first_wave_is_measured_against_the_best_of_audits():
    calibration = Calibration(SETTINGS, 64)
    for best in (1.0, 2.0, 3.0):
        assert planned(calibration).first_wave == 0
        calibration.observe(1, CHOICE, audited([best, best - 2.0]), 0.1)
    choice = planned(calibration)
    assert choice.first_wave == 2
    assert choice.enough is not None
    assert choice.enough.best == pytest.approx(2.0)
    assert choice.enough.spread == pytest.approx(1.0)


def test_while_two_versions_are_compared_both_have_a_first_wave_or_none():
    calibration = Calibration(SETTINGS, 64)

    def first_wave(version: int) -> int:
        return calibration.plan(version, Choice(4, 0.5, 0.03), 64, 0, compared=(1, 2))[0].first_wave

    for _ in range(3):
        calibration.observe(1, CHOICE, audited([3.0, 1.0]), 0.1)
    assert planned(calibration).first_wave == 2
    assert (first_wave(1), first_wave(2)) == (0, 0)
    for _ in range(3):
        calibration.observe(2, CHOICE, audited([2.0, 1.0]), 0.1)
    assert (first_wave(1), first_wave(2)) == (2, 2)


def test_waves_stay_off_where_they_are_not_set():
    calibration = Calibration(Guidance(min_audits=1), 64)
    calibration.observe(1, CHOICE, audited([1.0, 2.0]), 0.1)
    assert planned(calibration).first_wave == 0


@pytest.mark.parametrize(("agrees", "prunes"), [(True, True), (False, False)])
def test_a_checkpoint_switches_itself_off_when_partial_rewards_say_too_little(agrees, prunes):
    calibration = Calibration(SETTINGS, 64)
    finals = [0.0, 1.0, 2.0, 3.0]
    partial = finals if agrees else [3.0, 0.0, 2.0, 1.0]
    stages = [(early, final) for early, final in zip(partial, finals, strict=True)]
    looked = planned(calibration)
    for seen in range(3):
        assert calibration.is_pruning(1, 0), f"after {seen} audits it is too early to say"
        calibration.observe(1, looked, audited(finals, stages), 0.1)
    assert calibration.is_pruning(1, 0) is prunes
    assert calibration.is_pruning(1, 1)
    assert [c.prunes for c in planned(calibration).checkpoints] == [prunes, True]
    assert calibration.correlation(1, 0) == pytest.approx(1.0 if agrees else -0.4)
    assert math.isnan(calibration.correlation(2, 0))


def test_of_rewards_only_audits_are_believed():
    calibration = Calibration(SETTINGS, 64)
    looked = planned(calibration)
    stages = [(3.0,), (0.0,), (2.0,), (1.0,)]
    for _ in range(5):
        outcome = audited([0.0, 1.0, 2.0, 3.0], stages)
        calibration.observe(1, looked, Outcome(outcome.candidates, Arm.STRATEGY, True), 0.1)
    assert calibration.is_pruning(1, 0)
    assert planned(calibration).first_wave == 0


def test_a_correlation_of_nothing_is_zero_and_not_unknown():
    calibration = Calibration(SETTINGS, 64)
    looked = planned(calibration)
    stages = [(2.0,), (4.0,), (1.0,), (3.0,)]  # ranks 2 4 1 3 against 1 2 3 4
    calibration.observe(1, looked, audited([0.0, 1.0, 2.0, 3.0], stages), 0.1)
    assert calibration.correlation(1, 0) == pytest.approx(0.0)


def planned_for(calibration: Calibration, choice: Choice, max_tokens: int) -> Choice:
    """Return what the choice would be without its time limit, but for the limit."""
    calm = calibration.plan(1, replace(choice, time_limit_s=None), max_tokens, 0)[0]
    return replace(calm, time_limit_s=choice.time_limit_s)


def scored(stage: tuple[float, ...], final: float | None) -> Candidate:
    return candidate(0, stage_rewards=stage, reward=final)


def test_the_rank_correlation_is_spearmans_over_who_was_still_running():
    candidates = [scored((10.0,), 0.1), scored((20.0,), 0.2), scored((15.0,), 0.9), scored((), 5.0)]
    # ranks 1 3 2 against 1 2 3: 1 - 6 * 2 / (3 * 8) = 0.5
    assert rank_correlation(candidates, 0) == pytest.approx(0.5)
    assert rank_correlation(candidates, 1) is None
    assert rank_correlation(candidates[:2], 0) is None
    assert rank_correlation([scored((1.0,), float(i)) for i in range(4)], 0) is None


@pytest.mark.parametrize(
    ("room", "limit", "expected_s", "gets"),
    [
        (64, None, None, (8, Extent.REQUESTED)),
        (8, None, None, (8, Extent.REQUESTED)),
        (3, None, None, (3, Extent.LOAD)),
        (-20, None, None, (1, Extent.LOAD)),
        (64, 1.0, 0.5, (8, Extent.REQUESTED)),
        (64, 0.25, 0.5, (4, Extent.DEADLINE)),
        (64, 0.0, 0.5, (1, Extent.DEADLINE)),
        (64, 0.1, None, (8, Extent.REQUESTED)),
        (2, 0.25, 0.5, (2, Extent.LOAD)),
        (6, 0.25, 0.5, (4, Extent.DEADLINE)),
    ],
)
def test_quality_gives_way_before_latency_does(room, limit, expected_s, gets):
    assert affordable(8, room=room, time_limit_s=limit, expected_s=expected_s) == gets


def test_a_busy_engine_gives_fewer_candidates():
    calibration = Calibration(SETTINGS, capacity=10)
    assert planned(calibration, n=4, in_flight=6).num_candidates == 4
    assert planned(calibration, n=4, in_flight=8).num_candidates == 2
    assert planned(calibration, n=4, in_flight=50).num_candidates == 1


def test_checkpoints_of_few_candidates_keep_at_least_one():
    calibration = Calibration(Guidance(checkpoints=(Checkpoint(at=0.5, keep=0.01),)), 64)
    assert [c.keep for c in planned(calibration, n=2).checkpoints] == [1]
