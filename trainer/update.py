"""PPO as an objective: score, estimate, improve, report."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thumbloop.config.trainer import Ppo
from thumbloop.types import PolicyVersion
from trainer import ppo
from trainer.advantages import estimate, normalise
from trainer.epochs import Progress, improve
from trainer.measure import Fixed
from trainer.models import Trunk
from trainer.rollouts import Rollout

MIN_EFFECTIVE_SHARE = 0.5


class PpoObjective:
    """Proximal policy optimisation with a critic; see Objective."""

    def __init__(self, settings: Ppo) -> None:
        self._settings = settings

    def improve(
        self,
        trunk: Trunk,
        rollouts: Sequence[Rollout],
        fixed: Fixed,
        rewards: Tensor,
        *,
        parent: PolicyVersion,
        generator: torch.Generator,
    ) -> dict[str, float]:
        """Improve the policy adapter and the critic.

        The policy stays as it was where the sampler was too far from it for the weights to correct.
        Where the replies hardly differ in reward, whitening makes large advantages of noise and Adam
        full steps: there both shrink, and the leash to the reference weighs more.
        """
        settings = self._settings
        kl_coef = next_kl_coef(parent, fixed, settings)
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
        weights = ppo.importance_weights(fixed.prox_logprobs, fixed.old_logprobs, fixed.mask)
        share = float(ppo.effective_sample_size(weights, fixed.mask))
        progress = Progress()
        if share >= MIN_EFFECTIVE_SHARE:
            advantages = signal * estimated.advantages
            progress = improve(trunk, fixed, advantages, settings, generator, step_scale=signal)
        return {
            "reward_signal": signal,
            "explained_variance": estimated.explained_variance,
            "effective_sample_share": share,
            "kl_coef": kl_coef,
            **describe_progress(progress),
        }


def next_kl_coef(parent: PolicyVersion, fixed: Fixed, settings: Ppo) -> float:
    """Return the price of a nat: as it is set, or where it adapts the parent's update's, moved by how far that took
    the parent."""
    if not settings.kl_coef_gain or not parent.metrics.get("kl_coef"):
        return settings.kl_coef
    mask = fixed.mask
    return ppo.adapt_kl_coef(
        parent.metrics["kl_coef"],
        float(fixed.prox_kl[mask].sum()) / len(mask),
        target=settings.reference_kl_target,
        gain=settings.kl_coef_gain,
    )


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
