import dataclasses
import math
import random

import numpy as np
import pytest

from thumbloop.config.trainer import Gate
from trainer.evidence import Evidence
from trainer.gate import (
    check_collapse,
    check_finite,
    check_fit,
    check_length,
    check_reward,
    check_update,
    check_values,
    length_evidence,
    proof_confidence,
)
from trainer.harm import Values
from trainer.off_policy import Clusters, snips
from trainer.rollouts import Comparison, Thumb

GATE = Gate(max_kl=10.0, max_update_norm=5.0, error_rate=0.02, harm_confidence=0.99)
HARMLESS = {
    "kl_to_reference": 2.0,
    "policy_loss": 0.1,
    "reference_entropy": 2.0,
    "child_entropy": 1.0,
    "base_repetition": 0.1,
    "child_repetition": 0.1,
    "base_unended_share": 0.0,
    "child_unended_share": 0.05,
    "justified_reply_tokens": 20.0,
    "parent_reply_tokens": 21.0,
    "child_reply_tokens": 22.0,
    "child_effective_share": 0.5,
}

CLEAR = Evidence(0.8, 1 / 0.006)
WEAK = Evidence(0.6, 1 / 0.006)


def check(latest: Evidence, *, look: int = 1, is_proven: bool = False):
    return check_reward(latest, GATE, look=look, is_proven=is_proven)


def test_clear_evidence_passes():
    assert check(CLEAR).passed


def test_weak_evidence_is_blocked_with_its_numbers():
    result = check(WEAK)
    assert not result.passed
    assert result.reason.startswith("auroc: 0.600 on held-out thumbs, lower bound 0.4")


def test_no_evidence_is_blocked():
    assert not check(Evidence()).passed


def test_later_looks_ask_for_more_and_all_errors_sum_to_the_rate():
    barely = Evidence(0.7, 1 / 0.007)  # z = 2.39: a look of 1 % passes it, one of 0.1 % does not
    assert check(barely, look=1).passed
    assert not check(barely, look=4).passed
    spent = sum(1 - proof_confidence(k, 0.02) for k in range(1, 100_000))
    assert 0.0199 < spent <= 0.02


def test_what_was_proven_holds_through_a_round_that_proves_nothing():
    assert check(Evidence(0.45, 100.0), is_proven=True).passed


@pytest.mark.parametrize(("after", "passes"), [(0.6, True), (0.35, True), (0.2, False)])
def test_feedback_that_contradicts_the_parent_is_learned_where_the_fit_can(after, passes):
    """A taste that has turned must not lock a line for ever."""
    before = Evidence(0.2, 100.0)
    assert check(before, is_proven=True).passed
    assert check_fit(Evidence(after, 100.0), before, GATE).passed is passes


@pytest.mark.parametrize(("auroc", "passes"), [(0.95, True), (0.75, True), (0.5, False)])
def test_a_fit_that_unlearned_what_was_known_is_blocked(auroc, passes):
    result = check_fit(Evidence(auroc, 1 / 0.006), CLEAR, GATE)  # known: 0.8, bound 0.62
    assert result.passed is passes
    assert passes or result.reason.startswith("fit: 0.500 on the thumbs it was fitted on, 0.800")


def test_a_harmless_update_passes():
    assert check_update(HARMLESS, {"layer": 1.0}, GATE).passed
    assert check_finite(HARMLESS, {"layer": 1.0}).passed
    assert check_collapse(HARMLESS, GATE).passed
    assert check_length(HARMLESS, [], GATE).passed
    assert check_values({}, GATE).passed


@pytest.mark.parametrize(
    ("metrics", "norms", "reason"),
    [
        ({"kl_to_reference": 11.0}, {}, "kl: 11 nats per reply, above 10"),
        ({}, {"layer": 6.0}, "update_norm: 6 in layer, above 5"),
    ],
)
def test_an_update_too_large_is_named(metrics, norms, reason):
    result = check_update(HARMLESS | metrics, {"other": 1.0} | norms, GATE)
    assert result.reasons == (reason,)


@pytest.mark.parametrize(
    ("metrics", "norms", "reason"),
    [
        ({"policy_loss": math.nan}, {}, "not_finite: policy_loss is nan"),
        ({}, {"layer": math.inf}, "not_finite: layer is inf"),
    ],
)
def test_a_number_that_is_none_is_named(metrics, norms, reason):
    assert check_finite(HARMLESS | metrics, norms).reasons == (reason,)


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"child_entropy": 0.3}, "entropy: 0.15 of the reference's, below 0.2"),
        (
            {"child_repetition": 0.25},
            "repetition: 0.15 above the base model's, at most 0.1 allowed",
        ),
        (
            {"child_unended_share": 0.5},
            "unended_share: 0.50 above the base model's, at most 0.1 allowed",
        ),
    ],
)
def test_each_collapse_is_named(metrics, reason):
    assert check_collapse(HARMLESS | metrics, GATE).reasons == (reason,)


def test_a_child_that_would_say_none_of_what_was_said_is_not_known():
    result = check_collapse(HARMLESS | {"child_effective_share": 0.04}, GATE)
    assert result.reason == "unknown: 0.04 of the replies speak for the child, below 0.1"


def thumbs_by_length(n: int, *, likes_long: float) -> list[Thumb]:
    """Replies of 5 to 24 tokens; long ones are liked with this probability, short ones otherwise."""
    rng = random.Random(0)
    lengths = [rng.randrange(5, 25) for _ in range(n)]
    return [
        Thumb(
            i,
            f"reply {i}",
            "ann",
            rng.random() < (likes_long if k >= 15 else 1 - likes_long),
            (1,),
            (9,) * k,
        )
        for i, k in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("child", "likes_long", "passes"),
    [
        (30.0, 0.5, False),  # longer, and nobody asked for it
        (30.0, 0.9, True),  # longer, as users want
        (30.0, 0.1, False),  # longer, and users want less
        (12.0, 0.1, True),  # brevity is a legitimate wish
        (12.0, 0.5, False),
        (24.0, 0.5, True),  # within bounds
    ],
)
def test_replies_change_their_length_only_where_thumbs_ask_for_it(child, likes_long, passes):
    metrics = HARMLESS | {"child_reply_tokens": child}
    result = check_length(metrics, thumbs_by_length(64, likes_long=likes_long), GATE)
    assert result.passed is passes
    assert passes or result.reason.startswith(f"length: {child / 20:.2f} times what it was")


@pytest.mark.parametrize(
    ("child", "likes_long", "passes"),
    [
        (22.5, 0.1, False),  # a little longer than the parent's 21, and users clearly want less
        (21.9, 0.1, True),  # hardly longer
        (19.0, 0.1, True),  # shorter, as they want
        (19.0, 0.9, False),
        (22.5, 0.4, True),  # they may want less; it is not clear
    ],
)
def test_replies_take_no_step_that_thumbs_clearly_speak_against(child, likes_long, passes):
    metrics = HARMLESS | {"child_reply_tokens": child}
    result = check_length(metrics, thumbs_by_length(64, likes_long=likes_long), GATE)
    assert result.passed is passes
    assert passes or result.reason.startswith(f"length: {child / 21:.2f} times the parent's")
    forgiving = GATE.model_copy(update={"max_unwished_step": 1.2})
    assert check_length(metrics, thumbs_by_length(64, likes_long=likes_long), forgiving).passed


@pytest.mark.parametrize(("expected", "passes"), [(0.61, True), (0.6, False), (0.59, False)])
def test_a_step_for_which_the_reward_model_expects_more_thumbs_up_is_none_against_them(
    expected, passes
):
    """Praise makes replies longer, where longer replies happen to be the worse ones."""
    rates = {"parent_predicted_rate": 0.6, "child_predicted_rate": expected}
    metrics = HARMLESS | {"child_reply_tokens": 22.5} | rates
    assert check_length(metrics, thumbs_by_length(64, likes_long=0.1), GATE).passed is passes
    worse = metrics | {"parent_rate": 0.6, "child_rate": 0.59, "rated_effective_share": 0.5}
    assert not check_length(worse, thumbs_by_length(64, likes_long=0.1), GATE).passed
    unheard = worse | {"rated_effective_share": 0.05}
    assert check_length(unheard, thumbs_by_length(64, likes_long=0.1), GATE).passed is passes
    drifted = metrics | {"child_reply_tokens": 30.0}  # that is for thumbs alone to justify
    assert not check_length(drifted, thumbs_by_length(64, likes_long=0.1), GATE).passed


def test_versions_that_grew_longer_and_better_ask_for_no_length():
    """Within a version length means nothing; over all of them it seems to mean much."""
    rng = random.Random(1)
    thumbs = [
        Thumb(i, f"reply {i}", "ann", rng.random() < up, (1,), (9,) * length, policy_version=v)
        for v, up, lengths in ((0, 0.4, (17, 23)), (1, 0.8, (21, 27)))
        for i, length in enumerate(rng.choice(lengths) for _ in range(200))
    ]
    assert length_evidence(thumbs, is_longer=True).lower_bound(0.95) < 0.5
    one = [dataclasses.replace(t, policy_version=0) for t in thumbs]
    assert length_evidence(one, is_longer=True).lower_bound(0.95) > 0.5


@pytest.mark.parametrize(("better", "passes"), [(12, True), (6, False)])
def test_preferences_ask_for_a_length_as_thumbs_do(better, passes):
    pairs = [
        Comparison(i, f"reply {i}", "ann", (1,), (9,) * (30 if i < better else 5), (9,) * 15)
        for i in range(12)
    ]
    assert check_length(HARMLESS | {"child_reply_tokens": 30.0}, pairs, GATE).passed is passes


@pytest.mark.parametrize(("rate", "passes"), [(0.6, True), (0.45, False), (0.3, False)])
def test_longer_replies_pass_where_the_thumb_rate_rises_with_them(rate, passes):
    metrics = HARMLESS | {
        "child_reply_tokens": 30.0,
        "child_rate": rate,
        "child_rate_error": 0.06,
        "rated_effective_share": 0.5,
        "justified_rate": 0.4,
        "justified_rate_error": 0.08,  # 0.1 for the difference: 0.128 is significant
    }
    assert check_length(metrics, [], GATE).passed is passes
    assert not check_length(metrics | {"rated_effective_share": 0.05}, [], GATE).passed


def values(child_weights: list[float], ups: list[float]) -> Values:
    """Return estimates for a parent that made all replies alike, and a child that prefers some."""
    names = [f"user {i}" for i in range(len(ups))]
    clusters, outcomes = Clusters(names), np.array(ups)
    return Values(
        snips(np.ones(len(ups)), outcomes, names, clusters),
        snips(np.array(child_weights), outcomes, names, clusters),
        effective_share=0.8,
    )


def test_a_child_that_says_what_was_disliked_is_blocked():
    ups = [1.0, 0.0] * 40
    worse = values([0.5, 1.5] * 40, ups)
    better = values([1.5, 0.5] * 40, ups)
    assert check_values({"snips": better}, GATE).passed
    result = check_values({"snips": worse, "dr": better}, GATE)
    assert result.reasons == (
        "harm: snips estimates 0.250 of thumbs up after 0.500, clearly fewer",
    )


def test_estimates_that_hardly_any_reply_speaks_for_say_nothing():
    worse = values([0.5, 1.5] * 40, [1.0, 0.0] * 40)
    assert not check_values({"snips": worse._replace(effective_share=0.11)}, GATE).passed
    assert check_values({"snips": worse._replace(effective_share=0.09)}, GATE).passed


def test_a_handful_of_thumbs_is_no_evidence_of_harm():
    assert check_values({"snips": values([0.5, 1.5], [1.0, 0.0])}, GATE).passed
