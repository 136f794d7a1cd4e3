"""What moves the policy: the protocol that PPO, and whatever comes after it, stands behind.

An objective gets rollouts with rewards, and changes the policy adapter. Data, rewards, gate and report
are not its business, and are the same for all.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from thumbloop.types import PolicyVersion
from trainer.measure import Fixed
from trainer.models import Trunk
from trainer.rollouts import Rollout


class Objective(Protocol):
    """An algorithm that learns from rewards."""

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
        """Improve the policy adapter on rollouts with rewards (B,), logits; return what is worth knowing.

        `fixed` holds what reference and parent say of the rollouts. What a child has to know of its
        parent's update goes into the numbers, which are the version's metrics.
        """
