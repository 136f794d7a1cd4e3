import math

import pytest

from thumbloop.config.trainer import Gate
from trainer.evidence import Evidence
from trainer.gate import judge_fit, judge_reward, judge_update

GATE = Gate(max_kl=10.0, max_update_norm=5.0, confidence=0.99)
HARMLESS = {"kl_to_reference": 2.0, "policy_loss": 0.1}


CLEAR = Evidence(0.8, 0.006, 900.0)
WEAK = Evidence(0.6, 0.006, 900.0)


def test_clear_evidence_passes():
    assert judge_reward(CLEAR, CLEAR, GATE).passed


def test_weak_evidence_is_blocked_with_its_numbers():
    verdict = judge_reward(WEAK, WEAK, GATE)
    assert not verdict.passed
    assert verdict.reason.startswith("auroc: 0.600 on held-out thumbs, lower bound 0.4")


def test_no_evidence_is_blocked():
    assert not judge_reward(Evidence(), Evidence(), GATE).passed


def test_what_was_proven_holds_through_a_round_that_proves_nothing():
    assert judge_reward(CLEAR, Evidence(0.45, 0.01, 300.0), GATE).passed


def test_a_round_that_contradicts_it_is_blocked():
    verdict = judge_reward(CLEAR, Evidence(0.2, 0.01, 300.0), GATE)
    assert verdict.reason.startswith("auroc_reversed: 0.200")


@pytest.mark.parametrize(("auroc", "passes"), [(0.95, True), (0.75, True), (0.5, False)])
def test_a_fit_that_unlearned_what_was_known_is_blocked(auroc, passes):
    verdict = judge_fit(Evidence(auroc, 0.006, 900.0), CLEAR, GATE)  # known: 0.8, bound 0.62
    assert verdict.passed is passes
    assert passes or verdict.reason.startswith("fit: 0.500 on the thumbs it was fitted on, 0.800")


def test_a_harmless_update_passes():
    assert judge_update(HARMLESS, {"layer": 1.0}, GATE).passed


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
    verdict = judge_update(HARMLESS | metrics, {"other": 1.0} | norms, GATE)
    assert not verdict.passed
    assert reason in verdict.reasons
