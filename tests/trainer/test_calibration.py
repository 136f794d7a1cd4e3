import numpy as np
import pytest

from trainer.calibration import (
    Calibration,
    Claims,
    calibration_error,
    calibration_noise,
    log_odds,
    recalibrate,
    settle,
)


def test_the_error_is_the_mean_gap_of_claim_and_outcome():
    # Two bins: claims of 0.2 with one up of two, claims of 0.9 with both up: gaps 0.3 and 0.1.
    assert calibration_error([0.2, 0.9, 0.2, 0.9], [1, 1, 0, 1], bins=2) == pytest.approx(0.2)


def test_claims_that_come_true_have_no_error_but_noise():
    rng = np.random.default_rng(0)
    claims = rng.uniform(size=2000)
    outcomes = rng.uniform(size=2000) < claims
    found, expected = calibration_error(claims, outcomes), calibration_noise(claims)
    assert expected == pytest.approx(0.025, abs=0.005)
    assert found == pytest.approx(expected, abs=0.015)
    assert calibration_error(claims, claims) == 0


def test_the_noise_is_what_perfect_claims_show_in_the_mean():
    rng = np.random.default_rng(1)
    claims = rng.uniform(0.1, 0.9, size=200)
    errors = [calibration_error(claims, rng.uniform(size=200) < claims) for _ in range(400)]
    assert np.mean(errors) == pytest.approx(calibration_noise(claims), rel=0.05)


def drawn(temperature: float, offset: float, n: int) -> Claims:
    """Claims whose outcomes follow another temperature than 1."""
    rng = np.random.default_rng(2)
    rewards = rng.normal(0, 3, size=n)
    probabilities = 1 / (1 + np.exp(-(rewards / temperature + offset)))
    return Claims(rewards.tolist(), (rng.uniform(size=n) < probabilities).tolist(), offset)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_whatever_the_offset(temperature):
    parts = [drawn(temperature, 0.0, 4000), drawn(temperature, 1.5, 4000)]
    found = recalibrate(parts, Calibration(offset=7.0))
    assert found.temperature == pytest.approx(temperature, rel=0.1)
    assert found.shift == pytest.approx(0, abs=0.15)
    assert found.offset == 7.0  # the fit's own, which no claim was made under


def test_a_shift_is_found_that_the_claims_do_not_know_of():
    whole = drawn(2.0, -1.0, 8000)
    found = recalibrate([whole._replace(offset=0.0)], Calibration())
    assert (found.temperature, found.shift) == pytest.approx((2.0, -1.0), rel=0.1)


def test_a_few_thumbs_that_agree_do_not_make_claims_certain():
    few = Claims([1.0, -1.0] * 3, [True, False] * 3)
    found = recalibrate([few], Calibration())
    assert 0.6 < found.temperature < 1
    assert found.shift == pytest.approx(0, abs=1e-4)


def test_without_claims_a_child_reads_rewards_as_its_parent_did():
    parent = Calibration(1.7, 0.3, -0.4)
    for nothing in ([], [Claims([], [])]):
        assert recalibrate(nothing, parent) == pytest.approx(parent, abs=1e-4)


def test_what_earlier_rounds_found_adds_up():
    """The same few thumbs again and again: what they say is believed more each time."""
    found, shifts = Calibration(), []
    for _ in range(4):
        found = recalibrate([Claims([0.0] * 12, [True] * 9 + [False] * 3)], found)
        shifts.append(found.shift)
    assert shifts == sorted(shifts)
    assert shifts[0] < 0.6 < 0.9 < shifts[-1] < np.log(3)


def test_a_model_settles_on_the_mean_of_what_it_learned_but_keeps_its_temperature():
    learned = Claims([3.0, 3.0, -3.0, -3.0] * 50, [True, True, True, False] * 50, 0.5)
    found = settle([learned], Calibration(2.0, offset=0.5))
    assert (found.temperature, found.offset) == (2.0, 0.5)
    claimed = Calibration(2.0, offset=0.5).probabilities([3.0, -3.0]).mean()
    assert claimed < 0.6
    assert found.probabilities([3.0, -3.0]).mean() == pytest.approx(0.75, abs=0.03)


def test_a_calibration_is_read_from_where_it_was_written():
    written = Calibration(1.7, 0.3, -0.4)
    assert Calibration.of(written.metrics) == written
    assert Calibration.of({}) == Calibration()


def test_a_calibration_reads_rewards():
    read = Calibration(temperature=2.0, offset=-3.0, shift=2.0).probabilities([2.0, 4.0])
    assert read.tolist() == pytest.approx([0.5, 0.731059], abs=1e-6)
    assert log_odds(0, 0) == 0
    assert log_odds(3, 1) == pytest.approx(0.693147, abs=1e-6)
