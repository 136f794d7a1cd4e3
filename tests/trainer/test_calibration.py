import numpy as np
import pytest

from trainer.calibration import (
    Calibration,
    Claims,
    calibration_error,
    calibration_noise,
    fit_temperature,
    log_odds,
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
    assert fit_temperature(parts) == pytest.approx(temperature, rel=0.1)


def test_a_few_thumbs_that_agree_do_not_make_claims_certain():
    few = Claims([1.0, -1.0] * 3, [True, False] * 3)
    assert fit_temperature([few]) > 0.5
    assert fit_temperature([Claims([], [])]) == pytest.approx(1, abs=1e-3)
    assert fit_temperature([]) == 1


def test_a_calibration_reads_rewards():
    read = Calibration(temperature=2.0, offset=-1.0).probabilities([2.0, 4.0])
    assert read.tolist() == pytest.approx([0.5, 0.731059], abs=1e-6)
    assert log_odds(0, 0) == 0
    assert log_odds(3, 1) == pytest.approx(0.693147, abs=1e-6)
