"""The mathematics of one PPO update: pure functions of tensors.

B sequences, T response tokens. Masks are bool, True where the token counts; padding may hold anything,
NaN included. No configuration, device, logging or I/O.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over True positions. Indexing, not x * mask: padding may hold NaN."""
    return x[mask].mean()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale the True positions of x (B, T) to mean 0 and variance 1; padding becomes 0.

    Over the whole batch, never a micro-batch, whose own mean is part of the signal
    (Andrychowicz et al. 2020, arXiv 2006.05990, section 3.5).
    """
    valid = x[mask]
    scale = valid.var(correction=0).add(1e-8).rsqrt()
    return torch.zeros_like(x).masked_scatter(mask, (valid - valid.mean()) * scale)


def log_distribution(logits: Tensor, temperature: Tensor) -> Tensor:
    """Log-probabilities (..., V) of the whole vocabulary under logits (..., V) at temperature (...).

    The temperature is the sampler's: what was sampled at 0.7 has its density at 0.7 only.
    """
    return (logits.float() / temperature.unsqueeze(-1)).log_softmax(dim=-1)


def token_logprobs(distribution: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (...) of the tokens (...) under a log-distribution (..., V)."""
    return distribution.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) on the policy's own samples: unbiased, any sign.

    In the reward it gives the right gradient (arXiv 2512.21852; Schulman 2020, "Approximating KL
    divergence").
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate the same KL per token: unbiased, nonnegative. A monitor, not a loss."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


def exact_kl(distribution: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) of each state (...), from log-distributions (..., V): no sampling noise."""
    return (distribution.exp() * (distribution - reference)).sum(dim=-1)


def exact_entropy(distribution: Tensor) -> Tensor:
    """Entropy of each state (...) in nats, from a log-distribution (..., V)."""
    return -(distribution.exp() * distribution).sum(dim=-1)


def entropy_estimate(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean entropy per token in nats, from the log-probabilities (B, T) of the policy's samples."""
    return -masked_mean(logprobs, mask)


def shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float
) -> Tensor:
    """Per-token rewards (B, T): the KL penalty on every token, the score (B,) on the last one.

    Ziegler et al. 2019 (arXiv 1909.08593), eq. 2. Every row needs at least one token. A truncated
    row has no score yet: pass 0 for it, and its bootstrap to gae().
    """
    rewards = (-kl_coef * kl_k1(logprobs, ref_logprobs)).masked_fill(~mask, 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


class NotFinite(ArithmeticError):
    """A gradient holds NaN or infinity: nothing can be learned from this batch."""


class Gae(NamedTuple):
    """What generalized advantage estimation gives; both (B, T), 0 in padding."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor, values: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> Gae:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    rewards, values (B, T); values[:, t] is of the state before token t. bootstrap (B,) is the value
    of the state after the last token: 0 where the reply is finished, the critic's estimate where it
    was truncated. Valid tokens come first in each row.
    """
    rewards, values = (x.masked_fill(~mask, 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(values)
    running, next_value = torch.zeros_like(bootstrap), bootstrap
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], running, 0.0)
    return Gae(advantages, (advantages + values).masked_fill(~mask, 0.0))


class PolicyLoss(NamedTuple):
    """The loss and what to watch beside it; scalars."""

    loss: Tensor
    approx_kl: Tensor  # k3 estimate of KL(proximal || current), nonnegative
    clip_fraction: Tensor
    max_log_ratio: Tensor  # largest |log r|; 0 before the first step
    max_weight: (
        Tensor  # largest w r: how much a single token counts; at most C before the first step
    )


def policy_loss(
    logprobs: Tensor,
    prox_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    max_weight: float,
) -> PolicyLoss:
    """Decoupled clipped surrogate, negated for descent. All inputs (B, T).

    -w min(r A, clip(r) A) with r = current / proximal (Schulman et al. 2017, eq. 7; decoupled as in
    Hilton et al. 2021, arXiv 2110.00641, eq. 2) and w = min(proximal / behaviour, max_weight), at
    token level and without gradient (AReaL, arXiv 2505.24298, section 5.2).
    """
    log_ratio = (logprobs - prox_logprobs).masked_fill(~mask, 0.0)
    weights = importance_weights(prox_logprobs, old_logprobs, mask).clamp(max=max_weight)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    with torch.no_grad():
        approx_kl = masked_mean(kl_k3(prox_logprobs, logprobs), mask)
        clip_fraction = masked_mean(((ratio - 1).abs() > clip).float(), mask)
    return PolicyLoss(
        loss=-masked_mean(weights * surrogate, mask),
        approx_kl=approx_kl,
        clip_fraction=clip_fraction,
        max_log_ratio=log_ratio.detach().abs().max(),
        max_weight=(weights * ratio).detach().max(),
    )


def importance_weights(prox_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Proximal over behaviour probability per token (B, T), without gradient; 0 in padding."""
    log_weights = (prox_logprobs - old_logprobs).detach()
    return log_weights.masked_fill(~mask, -torch.inf).exp()


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """Kish's effective share of the samples, in (0, 1]: 1 when all weights are equal."""
    valid = weights[mask]
    return valid.sum().square() / (valid.square().sum() * valid.numel())


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float
) -> Tensor:
    """Half the squared error, or that of the clipped move from old_values where it is worse.

    All inputs (B, T). As in the code of Schulman et al. 2017 (Engstrom et al. 2020, arXiv
    2005.12729, eq. 3).
    """
    values, old_values, returns = (x[mask] for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()).mean()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values explain: 1 is perfect, 0 is a constant."""
    residual = (returns - values)[mask].var(correction=0)
    return 1 - residual / returns[mask].var(correction=0).clamp(min=1e-8)


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, gain: float) -> float:
    """The next KL coefficient: up where the KL exceeds its target, down where it falls short.

    Ziegler et al. 2019, section 2.2, with their error bound of 0.2 and K_beta as the gain.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + gain * error)
