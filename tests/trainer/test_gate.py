import math

import pytest

from thumbloop.config.trainer import Gate
from trainer.evidence import Evidence
from trainer.gate import check_fit, check_reward, check_update

GATE = Gate(max_kl=10.0, max_update_norm=5.0, confidence=0.99)
HARMLESS = {"kl_to_reference": 2.0, "policy_loss": 0.1}


CLEAR = Evidence(0.8, 0.006, 900.0)
WEAK = Evidence(0.6, 0.006, 900.0)


def test_clear_evidence_passes():
    assert check_reward(CLEAR, CLEAR, GATE).passed


def test_weak_evidence_is_blocked_with_its_numbers():
    result = check_reward(WEAK, WEAK, GATE)
    assert not result.passed
    assert result.reason.startswith("auroc: 0.600 on held-out thumbs, lower bound 0.4")


def test_no_evidence_is_blocked():
    assert not check_reward(Evidence(), Evidence(), GATE).passed


def test_what_was_proven_holds_through_a_round_that_proves_nothing():
    assert check_reward(CLEAR, Evidence(0.45, 0.01, 300.0), GATE).passed


def test_a_round_that_contradicts_it_is_blocked():
    result = check_reward(CLEAR, Evidence(0.2, 0.01, 300.0), GATE)
    assert result.reason.startswith("auroc_reversed: 0.200")


@pytest.mark.parametrize(("auroc", "passes"), [(0.95, True), (0.75, True), (0.5, False)])
def test_a_fit_that_unlearned_what_was_known_is_blocked(auroc, passes):
    result = check_fit(Evidence(auroc, 0.006, 900.0), CLEAR, GATE)  # known: 0.8, bound 0.62
    assert result.passed is passes
    assert passes or result.reason.startswith("fit: 0.500 on the thumbs it was fitted on, 0.800")


def test_a_harmless_update_passes():
    assert check_update(HARMLESS, {"layer": 1.0}, GATE).passed


@pytest.mark.parametrize(
    ("metrics", "norms", "reason"),
    [
        ({"kl_to_reference": 11.0}, {}, "kl: 11 nats per reply, above 10"),
        ({}, {"layer": 6.0}, "update_norm: 6 in layer, above 5"),
        ({"policy_loss": math.nan}, {}, "not_finite: policy_loss is nan"),
        ({}, {"layer": math.inf}, "not_finite: layer is inf"),
    ],
)
def test_each_harm_is_named(metrics, norms, reason):
    result = check_update(HARMLESS | metrics, {"other": 1.0} | norms, GATE)
    assert not result.passed
    assert reason in result.reasons
