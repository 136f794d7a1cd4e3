import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.ppo import (
    adapt_kl_coef,
    effective_sample_size,
    entropy_estimate,
    exact_entropy,
    exact_kl,
    explained_variance,
    gae,
    importance_weights,
    kl_k1,
    kl_k3,
    log_distribution,
    masked_mean,
    policy_loss,
    shaped_rewards,
    token_logprobs,
    value_loss,
    whiten,
)

NAN = float("nan")
ALL = torch.ones(1, 1, dtype=torch.bool)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def left_aligned(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


@given(st.integers(0, 10_000))
def test_whitening_centres_and_scales_over_the_whole_batch(seed):
    x = torch.randn(3, 5, generator=seeded(seed), dtype=torch.float64) * 7 + 40
    mask = left_aligned([5, 2, 4], 5)
    whitened = whiten(x, mask)
    assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-9)
    assert whitened[mask].var(correction=0).item() == pytest.approx(1, rel=1e-4)
    assert (whitened[~mask] == 0).all()


def test_whitening_keeps_rows_apart():
    whitened = whiten(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), left_aligned([2, 2], 2))
    assert whitened.flatten().tolist() == pytest.approx([-1, -1, 1, 1])


def test_nan_in_padding_does_not_reach_a_mean():
    x, mask = torch.tensor([[1.0, 3.0, NAN]]), torch.tensor([[True, True, False]])
    assert masked_mean(x, mask).item() == 2
    assert whiten(x, mask).tolist() == [[pytest.approx(-1), pytest.approx(1), 0]]


def test_token_logprobs_are_of_the_tempered_distribution():
    logits = torch.tensor([[math.log(1.0), math.log(9.0)]])
    token = torch.tensor([1])
    cold = log_distribution(logits, torch.ones(1))
    assert token_logprobs(cold, token).exp().item() == pytest.approx(0.9)
    hot = log_distribution(logits, torch.full((1,), 2.0))
    assert token_logprobs(hot, token).exp().item() == pytest.approx(
        0.75  # temperature 2 takes square roots: 3 / (1 + 3)
    )


def test_each_row_has_its_own_temperature():
    logits = torch.tensor([[[0.0, math.log(4.0)]]]).repeat(2, 1, 1)
    distribution = log_distribution(logits, torch.tensor([[1.0], [2.0]]))
    logprobs = token_logprobs(distribution, torch.ones(2, 1, dtype=torch.long))
    assert logprobs.exp().flatten().tolist() == pytest.approx([4 / 5, 2 / 3])


def test_kl_estimators_agree_with_the_closed_form():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = 0.7 * math.log(7 / 3) + 0.2 * math.log(2 / 3) + 0.1 * math.log(1 / 4)
    for estimator in (kl_k1, kl_k3):
        estimates = estimator(policy.log(), reference.log())
        assert (policy * estimates).sum().item() == pytest.approx(exact, rel=1e-5)


def test_the_exact_kl_is_the_closed_form_at_the_samplers_temperature():
    policy, reference = torch.tensor([[[0.7, 0.2, 0.1]]]), torch.tensor([[[0.3, 0.3, 0.4]]])
    exact = 0.7 * math.log(7 / 3) + 0.2 * math.log(2 / 3) + 0.1 * math.log(1 / 4)

    def kl(temperature: float) -> float:
        at = torch.full((1, 1), temperature)  # logits have no zero point: hence the 5
        of_policy, of_reference = (
            log_distribution(x, at) for x in (policy.log() + 5, reference.log())
        )
        return exact_kl(of_policy, of_reference).item()

    assert kl(1.0) == pytest.approx(exact, rel=1e-5)
    assert kl(1e4) == pytest.approx(0, abs=1e-6)


def test_the_exact_entropy_of_a_fair_die_is_log_six():
    die = log_distribution(torch.zeros(2, 3, 6), torch.ones(2, 1))
    assert exact_entropy(die).tolist() == [[pytest.approx(math.log(6))] * 3] * 2
    sure = log_distribution(torch.tensor([[100.0, 0.0]]), torch.ones(1))
    assert exact_entropy(sure).item() == pytest.approx(0, abs=1e-6)


@given(st.floats(-8, 0), st.floats(-8, 0))
def test_k3_is_never_negative_and_zero_for_equals(logprob, ref_logprob):
    a, b = (
        torch.tensor(logprob, dtype=torch.float64),
        torch.tensor(ref_logprob, dtype=torch.float64),
    )
    assert kl_k3(a, b).item() >= 0
    assert kl_k3(a, a).item() == 0


def test_entropy_of_a_fair_coin_is_log_two():
    logprobs = torch.tensor([[0.5, 0.5, 0.1]]).log()
    mask = torch.tensor([[True, True, False]])
    assert entropy_estimate(logprobs, mask).item() == pytest.approx(math.log(2))


def test_the_score_lands_on_the_last_token_and_kl_on_every_one():
    logprobs = torch.tensor([[-1.0, -1.0, NAN], [-2.0, -1.0, -1.0]])
    ref_logprobs = torch.tensor([[-3.0, -1.0, NAN], [-2.0, -1.0, -2.0]])
    rewards = shaped_rewards(
        torch.tensor([5.0, -1.0]), logprobs, ref_logprobs, left_aligned([2, 3], 3), kl_coef=0.5
    )
    assert rewards.tolist() == [[-1, 5, 0], [0, 0, pytest.approx(-1.5)]]


def test_gae_matches_numbers_worked_by_hand():
    # deltas: 0 + 0.5 - 0.2 = 0.3; 1 + 0 - 0.5 = 0.5; first advantage 0.3 + 0.9 * 0.5
    estimate = gae(
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([[0.2, 0.5]]),
        torch.zeros(1),
        left_aligned([2], 2),
        gamma=1.0,
        lam=0.9,
    )
    assert estimate.advantages.tolist() == [[pytest.approx(0.75), pytest.approx(0.5)]]
    assert estimate.returns.tolist() == [[pytest.approx(0.95), pytest.approx(1.0)]]


def test_a_truncated_reply_bootstraps_from_its_last_state():
    values, mask = torch.tensor([[0.2, 0.5, NAN]]), left_aligned([2], 3)
    rewards = torch.tensor([[0.0, 0.0, NAN]])
    finished = gae(rewards, values, torch.zeros(1), mask, gamma=1.0, lam=1.0)
    truncated = gae(rewards, values, torch.tensor([0.8]), mask, gamma=1.0, lam=1.0)
    assert finished.advantages[0, :2].tolist() == pytest.approx([-0.2, -0.5])
    assert truncated.advantages[0, :2].tolist() == pytest.approx([0.6, 0.3])
    assert truncated.returns[0].tolist() == pytest.approx([0.8, 0.8, 0])


def slow_gae(rewards, values, bootstrap, *, gamma, lam):
    """One row at a time, as the sum that the definition writes out."""
    values = [*values, bootstrap]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
        for t in range(len(deltas))
    ]


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.floats(0.5, 1),
    st.floats(0, 1),
    st.integers(0, 10_000),
)
def test_gae_agrees_with_a_slow_loop_whatever_the_padding(lengths, gamma, lam, seed):
    shape = (len(lengths), 8)
    rewards, values = (
        torch.randn(shape, generator=seeded(seed + i), dtype=torch.float64) for i in (0, 1)
    )
    bootstrap = torch.randn(len(lengths), generator=seeded(seed + 2), dtype=torch.float64)
    mask = left_aligned(lengths, 8)
    fast = gae(
        rewards.masked_fill(~mask, NAN), values, bootstrap, mask, gamma=gamma, lam=lam
    ).advantages
    for row, length in enumerate(lengths):
        slow = slow_gae(
            rewards[row, :length].tolist(),
            values[row, :length].tolist(),
            bootstrap[row].item(),
            gamma=gamma,
            lam=lam,
        )
        assert fast[row, :length].tolist() == pytest.approx(slow, abs=1e-9)
        assert (fast[row, length:] == 0).all()


def loss_of(logprobs, prox_logprobs, old_logprobs, advantages, mask, clip=0.2, max_weight=2.0):
    return policy_loss(
        logprobs, prox_logprobs, old_logprobs, advantages, mask, clip=clip, max_weight=max_weight
    )


def test_equal_policies_have_ratio_one_no_kl_and_no_clipping():
    logprobs = torch.tensor([[-1.0, -2.0]])
    advantages = torch.tensor([[1.0, -3.0]])
    outcome = loss_of(logprobs, logprobs, logprobs, advantages, left_aligned([2], 2))
    assert outcome.loss.item() == 1  # minus the mean advantage
    assert (outcome.approx_kl, outcome.clip_fraction, outcome.max_log_ratio) == (0, 0, 0)
    assert outcome.max_weight == 1


def test_clipping_caps_the_gain_but_not_the_pain():
    logprobs, old_logprobs = torch.tensor([[1.5]]).log(), torch.zeros(1, 1)  # ratio 1.5
    gain = torch.ones(1, 1)
    assert loss_of(logprobs, old_logprobs, old_logprobs, gain, ALL).loss.item() == pytest.approx(
        -1.2
    )
    assert loss_of(logprobs, old_logprobs, old_logprobs, -gain, ALL).loss.item() == pytest.approx(
        1.5
    )


def test_a_clipped_gain_gives_no_gradient_and_a_pain_does():
    for advantage, expected in ((1.0, 0.0), (-1.0, 1.5)):
        logprobs = torch.tensor([[1.5]]).log().requires_grad_()
        old_logprobs = torch.zeros(1, 1)
        loss_of(
            logprobs, old_logprobs, old_logprobs, torch.full((1, 1), advantage), ALL
        ).loss.backward()
        assert logprobs.grad.item() == pytest.approx(expected)


def test_a_good_token_becomes_likelier():
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    fixed = logprobs.detach()
    loss_of(
        logprobs, fixed, fixed, torch.tensor([[2.0, -1.0]]), left_aligned([2], 2)
    ).loss.backward()
    assert logprobs.grad[0, 0] < 0 < logprobs.grad[0, 1]  # descent raises the first


def test_staleness_is_corrected_by_a_truncated_weight_without_gradient():
    prox = torch.tensor([[math.log(0.6), math.log(0.6)]])
    old = torch.tensor([[math.log(0.4), math.log(0.1)]])  # weights 1.5, and 6 truncated to 2
    mask = left_aligned([2], 2)
    assert importance_weights(prox, old, mask)[0].tolist() == pytest.approx([1.5, 6])
    outcome = loss_of(prox, prox, old, torch.ones(1, 2), mask)
    assert outcome.loss.item() == pytest.approx(-1.75)
    assert outcome.approx_kl.item() == 0  # the trust region is around the proximal policy


def test_the_gradient_of_the_decoupled_loss_is_the_numerical_one():
    mask = left_aligned([4, 2], 4)
    logprobs, prox, old, advantages = (
        torch.randn(2, 4, generator=seeded(i), dtype=torch.float64) * scale
        for i, scale in enumerate((0.3, 0.3, 0.5, 1.0))
    )

    def loss(x: Tensor) -> Tensor:
        return loss_of(x, prox, old, advantages, mask).loss

    logprobs.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logprobs), logprobs)
    step = 1e-6
    for row, column in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 3)]:
        bump = torch.zeros_like(logprobs)
        bump[row, column] = step
        numerical = (loss(logprobs + bump) - loss(logprobs - bump)) / (2 * step)
        assert gradient[row, column].item() == pytest.approx(numerical.item(), abs=1e-7)


def test_padding_changes_neither_loss_nor_gradient_not_even_as_nan():
    def outcome_and_gradient(padding: list[float]) -> tuple[float, list[float]]:
        logprobs = torch.tensor([[-1.0, -1.5, *padding]], requires_grad=True)
        rest = [torch.tensor([[*pair, *padding]]) for pair in ((-1.1, -1.2), (-1, -2), (1, -1))]
        loss = loss_of(logprobs, *rest, left_aligned([2], 2 + len(padding))).loss
        loss.backward()
        assert (logprobs.grad[0, 2:] == 0).all()
        return loss.item(), logprobs.grad[0, :2].tolist()

    assert outcome_and_gradient([]) == outcome_and_gradient([NAN, 7.0])


def test_value_loss_pays_for_the_worse_of_free_and_clipped():
    values, old_values, returns = (torch.tensor([[x]]) for x in (1.0, 0.0, 1.0))
    # The move of 1.0 is clipped to 0.2, 0.8 short of the return.
    assert value_loss(values, old_values, returns, ALL, clip=0.2).item() == pytest.approx(0.32)
    assert value_loss(values, old_values, -returns, ALL, clip=0.2).item() == pytest.approx(2.0)


def test_nan_in_padding_does_not_reach_the_critic():
    values = torch.tensor([[1.0, 2.0]], requires_grad=True)
    other = torch.tensor([[0.9, NAN]])
    value_loss(values, other, other, torch.tensor([[True, False]]), clip=0.2).backward()
    assert values.grad[0, 0] > 0
    assert values.grad[0, 1] == 0


def test_explained_variance_of_the_perfect_the_constant_and_the_wrong():
    returns, mask = torch.tensor([[1.0, 3.0, NAN]]), left_aligned([2], 3)
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(torch.full((1, 3), 5.0), returns, mask).item() == 0
    assert explained_variance(-returns, returns, mask).item() == -3


def test_effective_sample_size_is_one_for_equal_weights_and_one_nth_for_a_single_one():
    mask = left_aligned([4], 5)
    assert effective_sample_size(torch.full((1, 5), 0.3), mask).item() == pytest.approx(1)
    assert effective_sample_size(torch.tensor([[1.0, 0, 0, 0, NAN]]), mask).item() == 0.25


def test_kl_coefficient_follows_its_target_in_bounded_steps():
    assert adapt_kl_coef(0.05, 6.0, target=6.0, gain=0.1) == 0.05
    assert adapt_kl_coef(0.05, 6.6, target=6.0, gain=0.1) == pytest.approx(0.05 * 1.01)
    assert adapt_kl_coef(0.05, 600.0, target=6.0, gain=0.1) == pytest.approx(0.05 * 1.02)
    assert adapt_kl_coef(0.05, 0.0, target=6.0, gain=0.1) == pytest.approx(0.05 * 0.98)
