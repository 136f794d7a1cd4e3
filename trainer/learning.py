"""What one round does between reading and publishing: evidence, reward fit, rescoring, PPO, gate."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thumbloop.config import TrainerConfig
from thumbloop.types import PolicyVersion
from trainer import reward
from trainer.dataset import Dataset
from trainer.epochs import RatioMismatch
from trainer.evidence import Evidence, pool
from trainer.gate import GateResult, check_fit, check_reward, check_update
from trainer.metrics import TrainerMetrics
from trainer.models import ADAPTERS, Trunk
from trainer.ppo import NotFinite, adapt_kl_coef
from trainer.rollouts import Rollout, Thumb
from trainer.update import update


class Learned(NamedTuple):
    """What a round learned: whether to publish it, its numbers, and the older thumbs it used."""

    gate: GateResult
    metrics: dict[str, float]
    replayed: tuple[int, ...] = ()


def learn(
    trunk: Trunk,
    data: Dataset,
    parent: PolicyVersion,
    config: TrainerConfig,
    metrics: TrainerMetrics,
    generator: torch.Generator,
) -> Learned:
    """Turn the parent's adapters in the trunk into a child's, as far as the gate lets them.

    Numbers that break down block the round like anything else that speaks against it.
    """
    try:
        return _learn(trunk, data, parent, config, metrics, generator)
    except (NotFinite, RatioMismatch) as error:
        gate = GateResult((f"broken: {error}",))
        return Learned(gate, {"feedback_used": float(len(data.new))})


def _learn(
    trunk: Trunk,
    data: Dataset,
    parent: PolicyVersion,
    config: TrainerConfig,
    metrics: TrainerMetrics,
    generator: torch.Generator,
) -> Learned:
    learned = learn_reward(trunk, data, parent, config, metrics, generator)
    if not learned.gate.passed:
        return learned
    numbers = learned.metrics | learn_policy(trunk, data, parent, config, metrics, generator)
    norms = {name: n for a in ADAPTERS for name, n in trunk.update_norms(a).items()}
    numbers["largest_update_norm"] = max(norms.values())
    return Learned(check_update(numbers, norms, config.gate), numbers, learned.replayed)


def learn_reward(
    trunk: Trunk,
    data: Dataset,
    parent: PolicyVersion,
    config: TrainerConfig,
    metrics: TrainerMetrics,
    generator: torch.Generator,
) -> Learned:
    """Fit the reward adapter, if it is proven that thumbs like these can be learned from."""
    with metrics.stage("evidence"):
        latest = gather_evidence(trunk, data.new, parent, config, generator)
        proven = strongest(parent, latest, config.gate.confidence)
    numbers = {
        "feedback_used": float(len(data.new)),
        "thumb_up_rate": sum(t.is_up for t in data.new) / len(data.new),
        "reward_auroc": proven.auroc,
        "reward_auroc_bound": proven.lower_bound(config.gate.confidence),
        "reward_auroc_variance": proven.variance,
        "reward_auroc_pairs": proven.pairs,
        "reward_auroc_latest": latest.auroc,
    }
    gate = check_reward(proven, latest, config.gate)
    if not gate.passed:
        return Learned(gate, numbers)
    with metrics.stage("reward fit"):
        replay = draw_replay(data, config.reward.replay_share, generator)
        numbers["reward_loss"] = fit_reward(trunk, [*data.new, *replay], config, generator)
        fitted = reward.evidence_on(trunk, data.new)
    numbers["reward_auroc_fitted"] = fitted.auroc
    replayed = tuple(t.feedback_id for t in replay)
    return Learned(check_fit(fitted, latest, config.gate), numbers, replayed)


def learn_policy(
    trunk: Trunk,
    data: Dataset,
    parent: PolicyVersion,
    config: TrainerConfig,
    metrics: TrainerMetrics,
    generator: torch.Generator,
) -> dict[str, float]:
    """Improve the policy adapter by the fitted reward model; return the numbers."""
    with metrics.stage("rescore"):
        rewards = rescore(trunk, data.rollouts)
    kl_coef = parent.metrics.get("next_kl_coef", config.ppo.kl_coef)
    with metrics.stage("ppo"):
        numbers = update(
            trunk,
            data.rollouts,
            rewards,
            config.ppo,
            kl_coef=kl_coef,
            parent=parent.version,
            generator=generator,
        )
    next_kl_coef = adapt_kl_coef(
        kl_coef,
        numbers["kl_to_reference"],
        target=config.ppo.reference_kl_target,
        gain=config.ppo.kl_coef_gain,
    )
    return numbers | {"rollouts": float(len(data.rollouts)), "next_kl_coef": next_kl_coef}


def gather_evidence(
    trunk: Trunk,
    new: Sequence[Thumb],
    parent: PolicyVersion,
    config: TrainerConfig,
    generator: torch.Generator,
) -> Evidence:
    """Try a reward model on thumbs it was not fitted on.

    The parent's has never seen the new ones, but for replies about which somebody changed their mind;
    where there is none yet, fits on some users are tried on the others.
    """
    if not parent.reward_digest:
        return reward.cross_fitted(trunk, new, config.reward, generator)
    return reward.evidence_on(trunk, [t for t in new if not t.is_seen])


def strongest(parent: PolicyVersion, latest: Evidence, confidence: float) -> Evidence:
    """Return the strongest evidence along the lineage: the parent's, or pooled with this round's."""
    if not parent.reward_digest:
        return latest
    earlier = Evidence(
        parent.metrics["reward_auroc"],
        parent.metrics["reward_auroc_variance"],
        parent.metrics["reward_auroc_pairs"],
    )
    return max(earlier, pool([earlier, latest]), key=lambda e: e.lower_bound(confidence))


def draw_replay(data: Dataset, share: float, generator: torch.Generator) -> list[Thumb]:
    """Draw older thumbs, at most `share` times as many as there are new ones."""
    size = min(len(data.older), int(share * len(data.new)))
    chosen = torch.randperm(len(data.older), generator=generator)[:size].tolist()
    return [data.older[i] for i in sorted(chosen)]


def fit_reward(
    trunk: Trunk, thumbs: Sequence[Thumb], config: TrainerConfig, generator: torch.Generator
) -> float:
    """Fit the reward adapter on weighted thumbs; return the loss."""
    weights = reward.thumb_weights(
        thumbs,
        max_weight=config.reward.max_weight,
        max_user_share=config.reward.max_user_share,
    )
    return reward.fit(trunk, thumbs, weights, config.reward, generator)


def rescore(trunk: Trunk, rollouts: Sequence[Rollout]) -> Tensor:
    """Return every rollout's reward (B,) by the round's own reward model.

    The logged reward explains why a reply was shown, nothing else. One that holds a verdict token
    gets the lowest reward of all.
    """
    rewards = reward.score(trunk, rollouts)
    forged = torch.tensor([trunk.verdict.is_forged_in(r.response) for r in rollouts])
    return torch.where(forged, rewards.min(), rewards)
