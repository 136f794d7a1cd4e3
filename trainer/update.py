"""One PPO update, told in order: measure, estimate, improve, report."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thumbloop.config.trainer import Ppo
from trainer import ppo
from trainer.advantages import estimate, normalise
from trainer.epochs import Progress, improve
from trainer.measure import Fixed, kl_to_reference, measure
from trainer.models import Trunk
from trainer.rollouts import Rollout

MIN_EFFECTIVE_SHARE = 0.5


def update(
    trunk: Trunk,
    rollouts: Sequence[Rollout],
    rewards: Tensor,
    settings: Ppo,
    *,
    kl_coef: float,
    parent: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Improve the policy adapter and the critic on rollouts with rewards (B,); return the metrics.

    The policy stays as it was where the sampler was too far from it for the weights to correct. Where
    the replies hardly differ in reward, whitening makes large advantages of noise and Adam full steps:
    there both shrink, and the leash to the reference weighs more.
    """
    fixed = measure(trunk, rollouts)
    scores, signal = normalise(rewards, rollouts, settings)
    estimated = estimate(
        trunk.value_head,
        rollouts,
        fixed,
        scores.to(trunk.device),
        settings,
        kl_coef=kl_coef,
        generator=generator,
    )
    trunk.value_head = estimated.head
    weights = ppo.importance_weights(fixed.prox_logprobs, fixed.old_logprobs, fixed.batch.mask)
    share = float(ppo.effective_sample_size(weights, fixed.batch.mask))
    progress = Progress()
    if share >= MIN_EFFECTIVE_SHARE:
        advantages = signal * estimated.advantages
        progress = improve(trunk, fixed, advantages, settings, generator, step_scale=signal)
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std(correction=0)),
        "reward_signal": signal,
        "explained_variance": estimated.explained_variance,
        "effective_sample_share": share,
        "kl_coef": kl_coef,
        **describe_rollouts(fixed, rollouts, parent),
        **describe_progress(progress),
        "kl_to_reference": float(kl_to_reference(trunk, fixed).sum()) / len(rollouts),
    }


def describe_rollouts(fixed: Fixed, rollouts: Sequence[Rollout], parent: int) -> dict[str, float]:
    """Return what the rollouts say of the parent: KL per reply, and where they are its own, entropy
    and the sampler's faith per token; nats.
    """
    mask = fixed.batch.mask
    described = {
        "mean_reply_tokens": float(mask.sum(dim=1).float().mean()),
        "parent_kl_to_reference": float(fixed.prox_kl[mask].sum()) / len(mask),
    }
    fresh = torch.tensor([r.policy_version == parent for r in rollouts], device=mask.device)
    if not fresh.any():
        return described
    own = mask & fresh[:, None]
    gap = ppo.kl_k3(fixed.old_logprobs, fixed.prox_logprobs)
    return described | {
        "entropy": float(ppo.entropy_estimate(fixed.prox_logprobs, own)),
        "sampler_trainer_kl": float(ppo.masked_mean(gap, own)),
    }


def describe_progress(progress: Progress) -> dict[str, float]:
    """Return how the epochs went."""
    described = {
        "optimizer_steps": float(progress.steps),
        "skipped_minibatches": float(progress.skipped),
        "stopped_early": float(progress.stopped_early),
    }
    if progress.losses:
        described["policy_loss"] = float(torch.stack([x.loss for x in progress.losses]).mean())
        described["approx_kl"] = float(progress.losses[-1].approx_kl)
        described["clip_fraction"] = float(
            torch.stack([x.clip_fraction for x in progress.losses]).mean()
        )
    return described
