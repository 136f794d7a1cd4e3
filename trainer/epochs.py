"""The epochs of one update: minibatches, the optimizer, and what stops them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thumbloop.config.trainer import Ppo
from trainer import ppo
from trainer.batches import Pair
from trainer.measure import Fixed, batches_of
from trainer.models import Trunk

RATIO_TOLERANCE = 1e-3
"""Of the largest |log r|, float32."""
HALF_PRECISION_TOLERANCE = 0.02
"""Of the mean of r - 1 - log r: as if all tokens were 0.2 nats off."""
EXPLODED_WEIGHT = 20.0
EARLY_STOP_FACTOR = 1.5


class RatioMismatch(AssertionError):
    """The policy disagrees with itself before its first step: an off-by-one or a wrong temperature."""


@dataclass(slots=True)
class Progress:
    """How the epochs went."""

    steps: int = 0
    skipped: int = 0
    stopped_early: bool = False
    losses: list[ppo.PolicyLoss] = field(default_factory=list)


def improve(
    trunk: Trunk,
    fixed: Fixed,
    advantages: Tensor,
    settings: Ppo,
    generator: torch.Generator,
    *,
    step_scale: float,
) -> Progress:
    """Run the epochs: one optimizer step per minibatch, until the policy has moved far enough.

    `step_scale` shortens the steps, which Adam makes equally long whatever the loss's scale.
    """
    parameters = list(trunk.parameters("policy").values())
    optimizer = torch.optim.Adam(parameters, lr=step_scale * settings.learning_rate)
    progress = Progress()
    for _ in range(settings.epochs):
        for rows in minibatches(fixed.pairs, settings, generator):
            optimizer.zero_grad()
            outcome = accumulate(trunk, fixed, advantages, rows, settings)
            if progress.steps + progress.skipped == 0:
                check_ratio(outcome, trunk.dtype)
            if outcome.approx_kl > EARLY_STOP_FACTOR * settings.target_kl:
                progress.stopped_early = True
                return progress
            if is_exploded(outcome):
                progress.skipped += 1
                continue
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            progress.steps += 1
            progress.losses.append(outcome)
    return progress


def minibatches(
    pairs: Sequence[Pair], settings: Ppo, generator: torch.Generator
) -> Sequence[Tensor]:
    """Return which rollouts each optimizer step takes: all of them once, in random order.

    Those of one prompt next to each other, where that is set: their prompt is then computed once.
    """
    order = torch.randperm(len(pairs), generator=generator)
    if settings.minibatches == "prompts":
        turn: dict[tuple[int, ...], int] = {}
        for row in order.tolist():
            turn.setdefault(pairs[row][0], len(turn))
        order = torch.tensor(sorted(order.tolist(), key=lambda row: turn[pairs[row][0]]))
    parts: tuple[Tensor, ...] = order.split(settings.minibatch_size)
    return parts


def accumulate(
    trunk: Trunk, fixed: Fixed, advantages: Tensor, rows: Tensor, settings: Ppo
) -> ppo.PolicyLoss:
    """Add a minibatch's gradient up over micro-batches; return the whole's loss.

    Each micro-batch counts by its tokens, so that short replies weigh no more than long ones. The
    gradient is that of the policy loss plus `kl_loss_coef` times the mean exact divergence from the
    reference in the states met.
    """
    tokens = int(fixed.mask[rows].sum())
    means, maxima = torch.zeros(3, device=trunk.device), torch.zeros(2, device=trunk.device)
    for part_rows, part in batches_of(trunk, fixed.pairs, rows.tolist()):
        width, share = part.mask.shape[1], float(part.mask.sum()) / tokens
        policy = trunk.respond(
            part,
            fixed.temperature[part_rows],
            "policy",
            reference=fixed.hidden[part_rows, : width + 1],
        )
        outcome = ppo.policy_loss(
            policy.logprobs,
            fixed.prox_logprobs[part_rows, :width],
            fixed.old_logprobs[part_rows, :width],
            advantages[part_rows, :width],
            part.mask,
            clip=settings.clip,
            max_weight=settings.max_importance_weight,
        )
        leash = settings.kl_loss_coef * ppo.masked_mean(policy.kl, part.mask)
        ((outcome.loss + leash) * share).backward()
        means += share * torch.stack(outcome[:3]).detach()
        maxima = torch.maximum(maxima, torch.stack(outcome[3:]))
    trunk.workers.add_gradients(list(trunk.parameters("policy").values()))
    (means,) = trunk.workers.total([means])
    return ppo.PolicyLoss(*means, *trunk.workers.largest(maxima))


def check_ratio(first: ppo.PolicyLoss, dtype: torch.dtype) -> None:
    """Make sure that the ratio is 1 before the first step.

    In half precision rounding moves single tokens far, as the batch is another than when they were measured: the
    mean tells it from a mistake. Raises RatioMismatch.
    """
    if dtype is torch.float32:
        off, tolerance = float(first.max_log_ratio), RATIO_TOLERANCE
    else:
        off, tolerance = float(first.approx_kl), HALF_PRECISION_TOLERANCE
    if not off <= tolerance:
        raise RatioMismatch(
            f"the first ratio is off by {off:.2g} nats, at most {tolerance} is rounding"
        )


def is_exploded(outcome: ppo.PolicyLoss) -> bool:
    """Say whether a minibatch would teach numerics: a token counts twenty-fold, or the loss is NaN."""
    return not (math.isfinite(float(outcome.loss)) and float(outcome.max_weight) <= EXPLODED_WEIGHT)
