"""Rollouts -> rewards: the thumbs' own model and whatever else the policy is to reach, by weight."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from thumbloop.config.shared import RewardComponent
from thumbloop.rewards import format_reward, length_reward
from trainer import reward
from trainer.calibration import Calibration
from trainer.models import Trunk
from trainer.rollouts import Rollout

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text, without special tokens."""


def rewards_of(
    trunk: Trunk,
    rollouts: Sequence[Rollout],
    components: Mapping[str, RewardComponent],
    calibration: Calibration,
    decode: Decode,
) -> dict[str, Tensor]:
    """Return every component's rewards (B,) by name, in logits, before weighting.

    Those of thumbs are the round's own reward model's, calibrated: the logged reward explains why a
    reply was shown, nothing else. A classifier looks at whole replies only: of others it says 0, which no
    objective reads.
    """

    def of(name: str, component: RewardComponent) -> Tensor:
        match component.kind:
            case "thumbs":
                return _of_thumbs(trunk, rollouts, calibration)
            case "length":
                return torch.tensor([_of_length(component, r) for r in rollouts])
            case "format":
                return torch.tensor(
                    [format_reward(decode(r.response), component.pattern) for r in rollouts]
                )
            case "classifier":
                return torch.tensor([r.components.get(name, 0.0) for r in rollouts])

    return {name: of(name, component) for name, component in components.items()}


def mix(
    rewards: Mapping[str, Tensor], components: Mapping[str, RewardComponent], is_forged: Tensor
) -> Tensor:
    """Return the weighted sum (B,); replies that hold a verdict token, (B,), get the lowest of all."""
    mixed = torch.stack([components[name].weight * r for name, r in rewards.items()]).sum(dim=0)
    return torch.where(is_forged, mixed.min(), mixed)


def forged(trunk: Trunk, rollouts: Sequence[Rollout]) -> Tensor:
    """Say which replies (B,) hold a verdict token."""
    return torch.tensor([trunk.verdict.is_forged_in(r.response) for r in rollouts])


def logged(components: Mapping[str, RewardComponent]) -> set[str]:
    """Return the names of components that only the server can compute."""
    return {name for name, component in components.items() if component.kind == "classifier"}


def _of_thumbs(trunk: Trunk, rollouts: Sequence[Rollout], calibration: Calibration) -> Tensor:
    rewards = reward.score(trunk, [(r.prompt, r.response) for r in rollouts])
    return torch.from_numpy(calibration.logits(rewards.numpy()))


def _of_length(component: RewardComponent, rollout: Rollout) -> float:
    return length_reward(
        len(rollout.response),
        target_tokens=component.target_tokens,
        scale_tokens=component.scale_tokens,
    )
