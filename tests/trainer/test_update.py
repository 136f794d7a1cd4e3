import random

import pytest
import torch
from torch import nn

from tests.rows import version
from thumbloop.config.trainer import Ppo
from trainer import critic
from trainer.advantages import estimate, normalise, prompt_folds
from trainer.critic import ValueHead
from trainer.drift import describe_child, describe_parent
from trainer.epochs import RatioMismatch, check_ratio, is_exploded
from trainer.measure import measure, measure_policy
from trainer.ppo import PolicyLoss
from trainer.rollouts import Rollout
from trainer.update import PpoObjective, next_kl_coef

PLANTED = 20
SETTINGS = Ppo(minibatch_size=16, epochs=3, learning_rate=3e-3, target_kl=1.0, min_reward_std=0.1)


def sampled(trunk, n: int, seed: int, **changes) -> list[Rollout]:
    """Replies drawn from the policy itself, with the log-probabilities they were drawn with."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rollouts = []
    for i in range(n):
        prompt = tuple(rng.randrange(6, 20) for _ in range(1 + i // 4 % 5))
        response, logprobs = [], []
        with torch.no_grad(), trunk.role("policy"):
            for _ in range(rng.randint(2, 6)):
                tokens = torch.tensor([[*prompt, *response]])
                distribution = trunk.causal(input_ids=tokens).logits[0, -1].log_softmax(dim=-1)
                token = int(torch.multinomial(distribution.exp(), 1))
                response.append(token)
                logprobs.append(distribution[token].item())
        fields = {"response_id": f"r{i // 4}", "policy_version": 3, "temperature": 1.0} | changes
        rollouts.append(
            Rollout(prompt=prompt, response=tuple(response), logprobs=tuple(logprobs), **fields)
        )
    return rollouts


def run(trunk, rollouts, rewards, generator, settings=SETTINGS):
    """Update once, without a price on the KL; return what is known of it."""
    fixed = measure(trunk, rollouts)
    parent = version(3, 2, metrics={"kl_coef": 0.0})
    numbers = PpoObjective(settings).improve(
        trunk, rollouts, fixed, rewards, parent=parent, generator=generator
    )
    child = describe_child(fixed, measure_policy(trunk, fixed), rollouts, [])
    return numbers | describe_parent(fixed, rollouts, [], 3) | child


def wish_for_planted(rollouts: list[Rollout]) -> torch.Tensor:
    return torch.tensor([3.0 if PLANTED in r.response else -3.0 for r in rollouts])


def planted_share(trunk) -> float:
    tokens = torch.tensor([[6, 7], [8, 9], [10, 11]])
    with torch.no_grad(), trunk.role("policy"):
        logits = trunk.causal(input_ids=tokens).logits[:, -1]
    return logits.softmax(dim=-1)[:, PLANTED].mean().item()


def test_a_planted_token_becomes_likelier(trunk, generator):
    before = planted_share(trunk)
    for seed in range(6):  # half as many bring anything from 0.8 to 2.7 times as much, by the seed
        rollouts = sampled(trunk, 96, seed)
        rewards = wish_for_planted(rollouts)
        metrics = run(trunk, rollouts, rewards, generator)
    assert metrics["optimizer_steps"] > 0
    assert planted_share(trunk) > 2 * before


def test_the_sampler_and_the_trainer_agree_on_fresh_rollouts(trained_trunk, generator):
    rollouts = sampled(trained_trunk, 16, 0)
    metrics = run(trained_trunk, rollouts, torch.randn(16, generator=generator), generator)
    assert metrics["sampler_trainer_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["effective_sample_share"] == pytest.approx(1, abs=1e-4)


def test_a_wrong_sampler_shows_in_the_metric(trained_trunk, generator):
    rollouts = sampled(trained_trunk, 16, 0, temperature=1.5)
    metrics = run(trained_trunk, rollouts, torch.randn(16, generator=generator), generator)
    assert metrics["sampler_trainer_kl"] > 1e-2


def test_an_update_touches_neither_reward_adapter_nor_trunk(trained_trunk, generator):
    policy = trained_trunk.parameters("policy")
    before = {n: p.clone() for n, p in trained_trunk.model.named_parameters() if n not in policy}
    rollouts = sampled(trained_trunk, 16, 0)
    run(trained_trunk, rollouts, torch.randn(16, generator=generator), generator)
    for name, parameter in trained_trunk.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])


def test_fitting_the_critic_leaves_the_policy_where_it_was(trained_trunk, generator):
    before = trained_trunk.snapshot("policy")
    rollouts = sampled(trained_trunk, 16, 0)
    settings = SETTINGS.model_copy(update={"learning_rate": 0.0})
    head = trained_trunk.value_head
    run(trained_trunk, rollouts, torch.randn(16, generator=generator), generator, settings)
    assert all(torch.equal(p, before[n]) for n, p in trained_trunk.parameters("policy").items())
    assert trained_trunk.value_head is not head


def test_the_kl_to_the_reference_starts_at_zero_and_grows(trunk, generator):
    rollouts = sampled(trunk, 96, 0)
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-2})
    metrics = run(trunk, rollouts, wish_for_planted(rollouts), generator, settings)
    assert metrics["parent_kl_to_reference"] == pytest.approx(0, abs=1e-4)
    assert metrics["kl_to_reference"] > 0.01


def test_the_kl_to_the_reference_is_that_of_the_policy_after_its_last_step(trunk, generator):
    rollouts = sampled(trunk, 32, 0)
    settings = SETTINGS.model_copy(
        update={"learning_rate": 1e-2, "epochs": 1, "minibatch_size": 32}
    )
    metrics = run(trunk, rollouts, wish_for_planted(rollouts), generator, settings)
    assert metrics["optimizer_steps"] == 1
    after = measure(trunk, rollouts)
    expected = float(after.prox_kl[after.mask].sum()) / 32
    assert metrics["kl_to_reference"] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


@pytest.mark.parametrize(("kl_loss_coef", "comes_nearer"), [(0.0, False), (1.0, True)])
def test_the_kl_in_the_loss_leads_back_to_the_reference(
    trained_trunk, generator, kl_loss_coef, comes_nearer
):
    rollouts = sampled(trained_trunk, 64, 0)
    settings = SETTINGS.model_copy(
        update={"kl_loss_coef": kl_loss_coef, "advantage_shift": 0.0, "learning_rate": 1e-3}
    )
    rewards = 3 * torch.randn(64, generator=generator)  # that mean nothing
    metrics = run(trained_trunk, rollouts, rewards, generator, settings)
    assert (metrics["kl_to_reference"] < 0.95 * metrics["parent_kl_to_reference"]) is comes_nearer


def test_epochs_stop_once_the_policy_has_moved_far_enough(trunk, generator):
    rollouts = sampled(trunk, 64, 0)
    rewards = wish_for_planted(rollouts)
    settings = SETTINGS.model_copy(update={"target_kl": 1e-4, "epochs": 9})
    metrics = run(trunk, rollouts, rewards, generator, settings)
    assert metrics["stopped_early"]
    assert metrics["optimizer_steps"] < 9 * 4


def test_rollouts_too_far_from_the_policy_do_not_move_it(trained_trunk, generator):
    before = trained_trunk.snapshot("policy")
    far = [
        Rollout(r.response_id, 3, r.prompt, r.response, (-9.0,) * len(r.response), 1.0)
        for r in sampled(trained_trunk, 16, 0)
    ]
    metrics = run(trained_trunk, far, torch.randn(16, generator=generator), generator)
    assert metrics["effective_sample_share"] < 0.5
    assert metrics["optimizer_steps"] == 0
    assert all(torch.equal(p, before[n]) for n, p in trained_trunk.parameters("policy").items())


def outcome(**changes: float) -> PolicyLoss:
    fields = dict.fromkeys(PolicyLoss._fields, 0.0) | changes
    return PolicyLoss(**{name: torch.tensor(value) for name, value in fields.items()})


def test_a_minibatch_in_which_one_token_counts_for_many_is_skipped():
    assert is_exploded(outcome(max_weight=50.0))
    assert is_exploded(outcome(loss=float("nan")))
    assert not is_exploded(outcome(max_weight=2.0))


def test_a_token_the_policy_has_given_up_does_not_skip_the_minibatch():
    assert not is_exploded(outcome(max_log_ratio=30.0, max_weight=1.5))


def test_a_ratio_that_is_not_one_at_the_start_is_an_error():
    check_ratio(outcome(max_log_ratio=1e-5), torch.float32)
    with pytest.raises(RatioMismatch):
        check_ratio(outcome(max_log_ratio=0.01), torch.float32)
    with pytest.raises(RatioMismatch):
        check_ratio(outcome(max_log_ratio=float("nan")), torch.float32)


def test_in_half_precision_single_tokens_may_be_off_and_all_of_them_may_not():
    check_ratio(outcome(max_log_ratio=0.8, approx_kl=0.003), torch.bfloat16)
    with pytest.raises(RatioMismatch):
        check_ratio(outcome(max_log_ratio=0.8, approx_kl=0.05), torch.bfloat16)
    with pytest.raises(RatioMismatch):
        check_ratio(outcome(approx_kl=float("nan")), torch.bfloat16)


def test_the_same_seed_gives_the_same_policy(trunk, generator):
    rollouts = sampled(trunk, 16, 0)
    rewards = torch.randn(16, generator=generator)
    start = trunk.snapshot("policy")
    ends = []
    for _ in range(2):
        trunk.restore("policy", start)
        torch.manual_seed(5)
        trunk.value_head = ValueHead(32)
        run(trunk, rollouts, rewards, torch.Generator().manual_seed(1))
        ends.append(trunk.snapshot("policy"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)


def test_the_price_of_a_nat_follows_how_far_the_parent_is_from_the_reference(trunk):
    fixed = measure(trunk, sampled(trunk, 8, 0))  # the reference itself: no divergence at all
    settings = SETTINGS.model_copy(update={"kl_coef_gain": 0.5, "kl_coef": 0.2})
    assert next_kl_coef(version(0, None, metrics={}), fixed, settings) == 0.2
    parent = version(3, 2, metrics={"kl_coef": 0.1})
    assert next_kl_coef(parent, fixed, settings) == pytest.approx(0.09)  # a fifth of a half off
    fixed_price = settings.model_copy(update={"kl_coef_gain": 0.0})
    assert next_kl_coef(parent, fixed, fixed_price) == 0.2  # a setting that was changed holds
    free = version(1, metrics={"kl_coef": 0.0})
    assert next_kl_coef(free, fixed, settings) == 0.2  # nothing times anything stays nothing


def rollout(**changes) -> Rollout:
    fields = {"response_id": "r", "policy_version": 0, "prompt": (1,), "response": (2,)}
    return Rollout(**{**fields, "logprobs": (-1.0,), "temperature": 1.0, **changes})


CERTAIN = 20.0
"""A reward whose probability rounds to 1; its negative's rounds to 0."""


def test_scores_are_centred_probabilities_of_unit_variance():
    scored = normalise(torch.tensor([CERTAIN, -CERTAIN]), [rollout(), rollout()], Ppo())
    assert scored.scores.tolist() == pytest.approx([1, -1])
    assert scored.signal == 1


def test_small_differences_stay_small_and_shorten_the_steps():
    nearly_equal = torch.tensor([0.51, 0.49]).logit()  # spread 0.01, a twentieth of 0.2
    scored = normalise(nearly_equal, [rollout(), rollout()], Ppo(min_reward_std=0.2))
    assert scored.scores.tolist() == pytest.approx([0.05, -0.05], abs=1e-5)
    assert scored.signal == pytest.approx(0.05, abs=1e-5)


def test_reward_beyond_certainty_buys_nothing():
    scored = normalise(torch.tensor([CERTAIN, 2 * CERTAIN]), [rollout(), rollout()], Ppo())
    assert scored.signal == pytest.approx(0, abs=1e-6)


def test_a_reply_without_an_end_pays_and_a_truncated_one_has_no_score():
    rollouts = [rollout(), rollout(has_eos=False), rollout(is_finished=False, has_eos=False)]
    rewards = torch.tensor([CERTAIN, -CERTAIN, 100.0])
    scored = normalise(rewards, rollouts, Ppo(missing_eos_penalty=0.5))
    assert scored.scores.tolist() == pytest.approx([1, -1.5, 0])


def test_a_batch_of_truncated_rollouts_only_has_no_scores():
    scored = normalise(torch.tensor([7.0]), [rollout(is_finished=False)], Ppo())
    assert (scored.scores.tolist(), scored.signal) == ([0], 0)


def test_steps_are_shorter_where_replies_hardly_differ(trunk, generator):
    rollouts = sampled(trunk, 32, 0)
    start = trunk.snapshot("policy")
    moved = []
    for size in (4.0, 0.04):
        trunk.restore("policy", start)
        rewards = torch.tensor([size * (PLANTED in r.response) for r in rollouts])
        run(trunk, rollouts, rewards, torch.Generator().manual_seed(1))
        moved.append(sum((p - start[n]).norm() for n, p in trunk.parameters("policy").items()))
    assert moved[1] < 0.2 * moved[0]


def test_the_leash_weighs_more_where_replies_hardly_differ(trained_trunk, generator):
    rollouts = sampled(trained_trunk, 64, 0)
    start = trained_trunk.snapshot("policy")
    rewards = torch.tensor([0.4, 0.6]).logit()[torch.arange(64) % 2]  # spread 0.1
    kls = []
    for min_reward_std, learning_rate in ((0.1, 1e-3), (0.5, 5e-3)):  # steps of the same length
        trained_trunk.restore("policy", start)
        settings = SETTINGS.model_copy(
            update={"min_reward_std": min_reward_std, "learning_rate": learning_rate}
        )
        metrics = run(trained_trunk, rollouts, rewards, torch.Generator().manual_seed(1), settings)
        kls.append(metrics["kl_to_reference"])
    assert kls[1] < 0.97 * kls[0]


def test_candidates_of_one_prompt_share_a_fold():
    rollouts = [rollout(prompt=(i // 4,)) for i in range(16)]
    folds = prompt_folds(rollouts).reshape(4, 4)
    assert (folds == folds[:, :1]).all()
    assert set(folds.flatten().tolist()) == {0, 1}


def test_the_critics_values_and_gradients_are_those_of_its_layers_one_after_another():
    torch.manual_seed(0)
    head, hidden = ValueHead(16), 3 + 2 * torch.randn(5, 7, 16)
    for parameter in head.parameters():  # a norm that scales and shifts, too
        nn.init.normal_(parameter)
    of_layers = head.layers(hidden).squeeze(-1)
    expected = torch.autograd.grad(of_layers.square().sum(), list(head.parameters()))
    values = head(hidden)
    found = torch.autograd.grad(values.square().sum(), list(head.parameters()))
    assert torch.allclose(values, of_layers, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_critic_learns_what_its_states_tell(generator):
    torch.manual_seed(0)
    hidden = torch.randn(32, 6, 16)
    returns = hidden[..., 3].tanh()
    mask = torch.ones(32, 6, dtype=torch.bool)
    head = critic.fit(ValueHead(16), hidden, returns, mask, clip=0.2, generator=generator)
    residual = (head(hidden) - returns).var() / returns.var()
    assert residual.item() < 0.3


def test_a_lower_baseline_shifts_every_advantage_alike(trained_trunk):
    rollouts = sampled(trained_trunk, 16, 0)
    fixed = measure(trained_trunk, rollouts)
    scores = torch.randn(16, generator=torch.Generator().manual_seed(0))
    by_shift = [
        estimate(
            trained_trunk.value_head,
            rollouts,
            fixed,
            scores,
            Ppo(advantage_shift=shift),
            kl_coef=0.1,
            generator=torch.Generator().manual_seed(1),
        ).advantages[fixed.mask]
        for shift in (0.0, 0.5)
    ]
    assert by_shift[0].mean().item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(by_shift[1], by_shift[0] + 0.5)


def test_measuring_fills_every_position_of_every_rollout(trained_trunk):
    rollouts = sampled(trained_trunk, 70, 0)  # more than two micro-batches
    fixed = measure(trained_trunk, rollouts)
    assert (fixed.prox_logprobs[fixed.mask] < 0).all()
    assert (fixed.ref_logprobs[fixed.mask] < 0).all()
    torch.testing.assert_close(fixed.prox_logprobs[fixed.mask], fixed.old_logprobs[fixed.mask])
