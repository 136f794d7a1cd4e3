import dataclasses

import pytest
import torch

from tests.trainer.test_update import sampled
from trainer.drift import describe_child, describe_parent, repetition
from trainer.measure import measure, measure_policy


def test_repetition_is_the_share_of_bigrams_said_before():
    assert repetition((1, 2, 3, 4)) == 0
    assert repetition((1, 2, 1, 2, 1)) == pytest.approx(0.5)  # 12 21 12 21
    assert repetition((1,)) == 0


def test_a_policy_that_stays_is_described_as_its_parent(trained_trunk):
    rollouts = sampled(trained_trunk, 24, 0)
    fixed = measure(trained_trunk, rollouts)
    parent = describe_parent(fixed, rollouts, [], 3)
    child = describe_child(fixed, measure_policy(trained_trunk, fixed), rollouts, [])
    assert child["child_effective_share"] == pytest.approx(1, abs=1e-4)
    assert child["kl_to_reference"] == pytest.approx(parent["parent_kl_to_reference"], rel=1e-4)
    for name in ("reply_tokens", "unended_share", "repetition"):
        assert child[f"child_{name}"] == pytest.approx(parent[f"parent_{name}"], rel=1e-4)
    lengths = [len(r.response) for r in rollouts]
    assert parent["parent_reply_tokens"] == pytest.approx(sum(lengths) / 24, rel=1e-4)


def test_lengths_of_the_child_are_weighed_by_what_it_would_say(trunk):
    """A child to whom long replies are twice as likely as to the sampler."""
    rollouts = sampled(trunk, 40, 0)
    fixed = measure(trunk, rollouts)
    moved = measure_policy(trunk, fixed)
    long = torch.tensor([len(r.response) > 4 for r in rollouts])
    first = torch.zeros_like(moved.logprobs)
    first[:, 0] = 1.0
    likelier = moved._replace(
        logprobs=moved.logprobs + first * torch.where(long, 2.0, 1.0).log()[:, None]
    )
    lengths = torch.tensor([float(len(r.response)) for r in rollouts])
    weights = torch.where(long, 2.0, 1.0)
    expected = float((weights * lengths).sum() / weights.sum())
    likes = long.float().tolist()  # what the reward model expects of them
    found = describe_child(fixed, likelier, rollouts, likes)
    assert found["child_reply_tokens"] == pytest.approx(expected, rel=1e-3)
    share = float((weights * long).sum() / weights.sum())
    assert found["child_predicted_rate"] == pytest.approx(share, rel=1e-3)
    before = describe_parent(fixed, rollouts, likes, 3)["parent_predicted_rate"]
    assert before == pytest.approx(float(long.float().mean()), rel=1e-3)
    assert "child_predicted_rate" not in describe_child(fixed, likelier, rollouts, [])


def test_cut_replies_say_nothing_of_whole_ones(trunk):
    rollouts = sampled(trunk, 8, 0)
    cut = [dataclasses.replace(r, is_finished=False, has_eos=False) for r in rollouts[:4]]
    mixed = [*cut, *rollouts[4:]]
    described = describe_parent(measure(trunk, mixed), mixed, [], 3)
    lengths = [len(r.response) for r in rollouts[4:]]
    assert described["parent_reply_tokens"] == pytest.approx(sum(lengths) / 4, rel=1e-4)
    assert described["parent_unended_share"] == 0
    assert "parent_reply_tokens" not in describe_parent(measure(trunk, cut), cut, [], 3)


def test_an_entropy_that_collapses_shows(trunk):
    rollouts = sampled(trunk, 8, 0)
    fixed = measure(trunk, rollouts)
    before = describe_child(fixed, measure_policy(trunk, fixed), rollouts, [])
    assert before["child_entropy"] == pytest.approx(
        describe_parent(fixed, rollouts, [], 3)["reference_entropy"], rel=1e-4
    )
    with torch.no_grad():
        trunk.causal.lm_head.weight.mul_(50)
    after = describe_child(fixed, measure_policy(trunk, fixed), rollouts, [])
    assert after["child_entropy"] < 0.3 * before["child_entropy"]
