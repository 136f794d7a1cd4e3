import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.trainer.test_update import PLANTED, sampled
from trainer import harm
from trainer.calibration import Calibration
from trainer.harm import ValueComparison, Values, describe_values, rated_samples
from trainer.measure import response_logprobs
from trainer.off_policy import Estimate
from trainer.rollouts import Rollout, Thumb


def thumbs(rollouts: list[Rollout]) -> list[Thumb]:
    """Thumbs up for replies without the planted token; one candidate each, so it was sure to be shown."""
    return [
        Thumb(
            i, r.response_id, r.user, PLANTED not in r.response, r.prompt, r.response, 1.0, sample=r
        )
        for i, r in enumerate(rollouts)
    ]


def of_users(rollouts: list[Rollout], users: int) -> list[Rollout]:
    return [dataclasses.replace(r, user=f"user {i % users}") for i, r in enumerate(rollouts)]


def like_planted(trunk, by: float) -> None:
    """Make the policy likelier to say the planted token, by its head."""
    with torch.no_grad():
        trunk.causal.lm_head.weight[PLANTED] *= by


def compare(trunk, rated: list[Thumb], candidates: list[Rollout]) -> ValueComparison:
    of_candidates = response_logprobs(trunk, candidates)
    return ValueComparison(trunk, rated_samples(rated), candidates, of_candidates, Calibration())


def test_only_thumbs_that_say_how_their_reply_was_sampled_and_shown_are_used(trunk):
    (sample,) = sampled(trunk, 1, 0)
    known = Thumb(0, "reply", "ann", True, (1,), (2,), 0.5, sample=sample)
    unknown = dataclasses.replace(known, propensity=None)
    foreign = dataclasses.replace(known, sample=None)
    assert rated_samples([known, unknown, foreign]) == ((known,), (sample,))


def test_a_policy_that_stays_gains_nothing(trunk):
    rollouts = of_users(sampled(trunk, 40, 0), 20)
    comparison = compare(trunk, thumbs(rollouts), rollouts)
    values = comparison.values(response_logprobs(trunk, rollouts))
    assert values.keys() == {"snips"}  # no reward was logged: nothing to predict with
    gain = values["snips"].gain
    assert gain.value == pytest.approx(0, abs=1e-6)
    assert gain.bounds(0.95) == pytest.approx((0, 0), abs=1e-6)
    assert values["snips"].effective_share == pytest.approx(1, abs=1e-4)


def test_what_guidance_hardly_shows_stands_for_much(trunk):
    rollouts = of_users(sampled(trunk, 40, 0), 20)
    rated = [
        dataclasses.replace(t, is_up=i % 2 == 0, propensity=0.75 if i % 2 == 0 else 0.25)
        for i, t in enumerate(thumbs(rollouts))
    ]
    values = compare(trunk, rated, rollouts).values(response_logprobs(trunk, rollouts))
    # Half of the thumbs are up, of replies shown three times as often as the others.
    assert values["snips"].parent.value == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("users", [1, 20])
def test_a_policy_that_says_more_of_what_is_disliked_is_seen_through(trunk, users):
    like_planted(trunk, 2.0)
    rollouts = of_users(sampled(trunk, 200, 0), users)
    rated = thumbs(rollouts)
    assert 0.2 < sum(t.is_up for t in rated) / 200 < 0.98
    predicted = [
        dataclasses.replace(r, reward=-1.0 if PLANTED in r.response else 1.0) for r in rollouts
    ]
    rated = [dataclasses.replace(t, sample=p) for t, p in zip(rated, predicted, strict=True)]
    comparison = compare(trunk, rated, predicted)
    like_planted(trunk, 1.5)
    values = comparison.values(response_logprobs(trunk, predicted))
    assert values.keys() == {"snips", "dr"}
    for each in values.values():
        _, high = each.gain.bounds(0.95)
        assert high < 0
        assert each.child.value < each.parent.value
        assert each.effective_share < 1


def test_replies_that_had_no_reward_are_left_aside_where_a_model_predicts(trunk):
    """Those of a version that had no reward model yet do not silence what later ones say."""
    rollouts = of_users(sampled(trunk, 80, 0), 20)
    predicted = [
        dataclasses.replace(r, reward=2.0 * (1 - 2 * (PLANTED in r.response))) for r in rollouts
    ]
    rated = [
        dataclasses.replace(t, sample=p) for t, p in zip(thumbs(rollouts), predicted, strict=True)
    ]
    some = [dataclasses.replace(r, reward=None) if i < 20 else r for i, r in enumerate(predicted)]
    mixed = [dataclasses.replace(t, sample=r) for t, r in zip(rated, some, strict=True)]
    whole = compare(trunk, rated[20:], predicted[20:]).values(
        response_logprobs(trunk, predicted[20:])
    )
    part = compare(trunk, mixed, some).values(response_logprobs(trunk, some))
    assert part["dr"].parent.value == pytest.approx(whole["dr"].parent.value, abs=1e-5)
    assert part["snips"].parent.value == pytest.approx(sum(t.is_up for t in rated) / 80, abs=1e-4)


def test_a_rated_reply_that_is_a_candidate_is_not_measured_again(trunk, monkeypatch):
    rollouts = of_users(sampled(trunk, 40, 0), 20)
    warm = dataclasses.replace(rollouts[0], temperature=2.0)  # the same words, not as likely
    rated, measured = thumbs([*rollouts, warm]), []

    def watched(trunk, some):
        measured.append(list(some))
        return response_logprobs(trunk, some)

    monkeypatch.setattr(harm, "response_logprobs", watched)
    known, unknown = compare(trunk, rated, rollouts), compare(trunk, rated, [])
    assert measured == [[warm], [t.sample for t in rated]]
    again, anew = known.values(response_logprobs(trunk, rollouts)), unknown.values(torch.zeros(0))
    assert again["snips"].parent.value == pytest.approx(anew["snips"].parent.value, abs=1e-5)


def test_nothing_is_estimated_where_the_child_says_nothing_of_what_was_rated(trunk):
    rollouts = of_users(sampled(trunk, 40, 0), 20)
    predicted = [dataclasses.replace(r, reward=0.5) for r in rollouts]
    rated = [
        dataclasses.replace(t, sample=p) for t, p in zip(thumbs(rollouts), predicted, strict=True)
    ]
    comparison = compare(trunk, rated, predicted)
    with torch.no_grad():
        trunk.causal.lm_head.weight.mul_(1e4)  # certain of one token in every state
    assert comparison.values(response_logprobs(trunk, predicted)) == {}


@pytest.mark.parametrize(("scored", "names"), [(1, {"snips"}), (2, {"snips", "dr"})])
def test_one_scored_reply_bounds_nothing(trunk, scored, names):
    rollouts = of_users(sampled(trunk, 12, 0), 12)
    some = [
        dataclasses.replace(r, reward=0.5 if i < scored else None) for i, r in enumerate(rollouts)
    ]
    rated = [dataclasses.replace(t, sample=r) for t, r in zip(thumbs(rollouts), some, strict=True)]
    values = compare(trunk, rated, some).values(response_logprobs(trunk, some))
    assert values.keys() == names
    assert all(math.isfinite(x) for each in values.values() for x in each.gain.bounds(0.95))


def test_how_replies_were_chosen_does_not_enter_the_share_that_speaks_for_the_child(trunk):
    rollouts = of_users(sampled(trunk, 32, 0), 20)
    rated = [
        dataclasses.replace(t, propensity=0.0075 if i == 0 else 0.98)
        for i, t in enumerate(thumbs(rollouts))
    ]
    values = compare(trunk, rated, rollouts).values(response_logprobs(trunk, rollouts))
    assert values["snips"].effective_share == pytest.approx(1, abs=1e-4)


def guided(rollouts: list[Rollout], propensities: tuple[float, ...]) -> list[Rollout]:
    """Candidates of one request each two, shown with these propensities; all have a reward."""
    return [
        dataclasses.replace(
            r, response_id=f"reply {i // 2}", reward=1.0, propensity=propensities[i % 2]
        )
        for i, r in enumerate(rollouts)
    ]


def errors(trunk, candidates: list[Rollout]) -> dict[str, float]:
    """Standard errors of the parent's rate, where the first candidate of each request was shown and liked."""
    rated = [
        dataclasses.replace(t, is_up=True, propensity=t.sample.propensity or 1.0)
        for t in thumbs(candidates)[::2]
    ]
    values = compare(trunk, rated, candidates).values(response_logprobs(trunk, candidates))
    return {name: each.parent.standard_error for name, each in values.items()}


def test_candidates_that_are_hardly_shown_make_estimates_uncertain(trunk):
    """All that was rated is liked: only who might have been shown instead says how little that means.

    20 requests, all rewards 1.0, so thumbs are up with 0.731 and vary by 0.443: sqrt((1 / 0.98 + 1 / 0.02) / (4 * 20)) of it.
    """
    rollouts = of_users(sampled(trunk, 40, 0), 20)
    sharp = errors(trunk, guided(rollouts, (0.98, 0.02)))
    assert sharp["dr"] == pytest.approx(0.443 * (51.02 / 80) ** 0.5, rel=1e-3)
    assert sharp["snips"] > sharp["dr"]  # predictions that are away from the rate count too
    even = errors(trunk, guided(rollouts, (0.5, 0.5)))
    assert even["dr"] == pytest.approx(0.443 * (4 / 80) ** 0.5, rel=1e-3)


def test_a_rate_is_reported_between_0_and_1_however_uncertain():
    unsure = Estimate(0.9, np.array([0.3, -0.3]), 2)
    found = describe_values({"dr": Values(unsure, unsure._replace(value=1.2), 0.8)})
    assert (found["dr_child_low"], found["dr_child"], found["dr_child_high"]) == (0, 1, 1)
    assert (found["dr_gain_low"], found["dr_gain_high"]) == pytest.approx((0.3, 0.3))  # in common
    assert (found["child_rate"], found["child_rate_error"]) == pytest.approx((1, 0.6))


def test_of_two_estimates_from_the_same_replies_the_doubly_robust_one_counts():
    plain, robust = (Estimate(x, np.array([0.1, -0.1]), 2) for x in (0.5, 0.7))
    both = {"snips": Values(plain, plain, 0.8), "dr": Values(robust, robust, 0.8)}
    assert describe_values(both)["child_rate"] == 0.7
    fewer = both | {"dr": Values(robust, robust, 0.2)}  # replies without a reward are left aside
    assert describe_values(fewer)["child_rate"] == 0.5


def test_requests_of_which_candidates_are_missing_say_nothing_of_what_was_not_shown(trunk):
    rollouts = of_users(sampled(trunk, 40, 0), 20)
    whole = guided(rollouts, (0.98, 0.02))
    assert errors(trunk, whole[::2] + whole[1::2])["dr"] > 0.3
    rated_only = [
        c if i % 2 == 0 else dataclasses.replace(c, reward=None) for i, c in enumerate(whole)
    ]
    assert errors(trunk, rated_only)["dr"] == pytest.approx(0, abs=1e-3)


def test_nothing_is_estimated_of_a_thumb_or_none(trunk):
    rollouts = sampled(trunk, 4, 0)
    for n in (0, 1):
        comparison = compare(trunk, thumbs(rollouts)[:n], rollouts)
        assert comparison.values(response_logprobs(trunk, rollouts)) == {}
