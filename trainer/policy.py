"""The policy's part of a round: rewards, an optional supervised warm start, the objective, and what it did."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thumbloop.config import TrainerConfig
from thumbloop.types import BASE_VERSION, PolicyVersion
from trainer.calibration import Calibration
from trainer.components import Decode, forged, mix, rewards_of
from trainer.dataset import Dataset
from trainer.drift import describe_child, describe_parent
from trainer.harm import ValueComparison, Values, describe_values, rated_samples
from trainer.measure import measure, measure_policy, of_responses
from trainer.metrics import TrainerMetrics
from trainer.models import Trunk
from trainer.objective import Objective
from trainer.rollouts import Rollout, Thumb
from trainer.supervised import imitate
from trainer.weights import weigh

CARRIED = {
    "base_repetition": "parent_repetition",
    "base_unended_share": "parent_unended_share",
    "justified_reply_tokens": "parent_reply_tokens",
    "justified_rate": "parent_rate",
    "justified_rate_error": "parent_rate_error",
}
"""What a version hands on to its children; the first one has it from its parent, the base model."""


class Improved(NamedTuple):
    """What the policy stage did: its numbers, and the estimated thumb rates by estimator."""

    metrics: dict[str, float]
    values: Mapping[str, Values]


class Rewarded(NamedTuple):
    """Rewards of rollouts: mixed (B,), the thumbs' part as probabilities (B,), which is empty where they have no part,
    and what is said of them.
    """

    mixed: Tensor
    likes: list[float]
    metrics: dict[str, float]


class PolicyStage:
    """Moves the policy adapter by the rewards of a round's rollouts."""

    def __init__(
        self,
        trunk: Trunk,
        objective: Objective,
        decode: Decode,
        config: TrainerConfig,
        metrics: TrainerMetrics,
    ) -> None:
        self._trunk = trunk
        self._objective = objective
        self._decode = decode
        self._config = config
        self._metrics = metrics

    def improve(
        self,
        data: Dataset,
        parent: PolicyVersion,
        calibration: Calibration,
        generator: torch.Generator,
    ) -> Improved:
        """Improve the policy by the fitted reward model, as `calibration` reads it."""
        rollouts, numbers = data.rollouts, dict[str, float]()
        with self._metrics.stage("rescore"):
            rewards, likes, described = self._rewards(rollouts, calibration)
        with self._metrics.stage("measure"):
            fixed = measure(self._trunk, rollouts)
            comparison = ValueComparison(
                self._trunk,
                rated_samples(data.new_thumbs),
                rollouts,
                of_responses(fixed.prox_logprobs, fixed.mask),
                Calibration.of(parent.metrics),
            )
            of_parent = describe_parent(fixed, rollouts, likes, parent.version)
        if self._config.supervised.enabled and parent.version == BASE_VERSION:
            with self._metrics.stage("supervised"):
                numbers["supervised_loss"] = self._imitate(data.new_thumbs, generator)
                fixed = measure(self._trunk, rollouts)
        with self._metrics.stage(self._config.objective):
            numbers |= self._objective.improve(
                self._trunk, rollouts, fixed, rewards, parent=parent, generator=generator
            )
        with self._metrics.stage("inspection"):
            moved = measure_policy(self._trunk, fixed)
            values = comparison.values(of_responses(moved.logprobs, fixed.mask))
            numbers |= of_parent | describe_child(fixed, moved, rollouts, likes)
        numbers |= {
            "rollouts": float(len(rollouts)),
            "rollout_staleness": data.staleness,
            **described,
            **describe_values(values),
        }
        for name, at_first in CARRIED.items():
            known = parent.metrics.get(name, numbers.get(at_first))
            if known is not None:
                numbers[name] = known
        return Improved(numbers, values)

    def _rewards(self, rollouts: Sequence[Rollout], calibration: Calibration) -> Rewarded:
        """Reward rollouts; means are over whole replies."""
        components = self._config.rewards
        parts = rewards_of(self._trunk, rollouts, components, calibration, self._decode)
        mixed = mix(parts, components, forged(self._trunk, rollouts))
        likes: list[float] = parts["thumbs"].sigmoid().tolist() if "thumbs" in parts else []
        whole = torch.tensor([r.is_finished for r in rollouts])
        if not whole.any():
            return Rewarded(mixed, likes, {})
        means = {f"reward_mean_{name}": float(part[whole].mean()) for name, part in parts.items()}
        spread = float(mixed[whole].std(correction=0))
        described = {"reward_mean": float(mixed[whole].mean()), "reward_std": spread, **means}
        return Rewarded(mixed, likes, described)

    def _imitate(self, thumbs: Sequence[Thumb], generator: torch.Generator) -> float:
        weights = weigh(thumbs, self._config.reward)
        return imitate(self._trunk, thumbs, weights, self._config.supervised, generator)
