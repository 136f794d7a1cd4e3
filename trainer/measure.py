"""What one update computes once, before the policy moves: reference, proximal policy, hidden states."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer import ppo
from trainer.models import Trunk
from trainer.rollouts import Batch, Rollout, by_length, collate, pad

MICRO_BATCH = 32


class Fixed(NamedTuple):
    """The fixed terms of an update; (B, T) unless noted."""

    batch: Batch
    temperature: Tensor  # (B, 1)
    old_logprobs: Tensor
    prox_logprobs: Tensor
    ref_logprobs: Tensor
    prox_kl: Tensor  # of the proximal policy from the reference, exact in each state
    ref_entropy: Tensor  # exact in each state, nats
    hidden: Tensor  # (B, T + 1, H), the reference's


@torch.no_grad()
def measure(trunk: Trunk, rollouts: Sequence[Rollout]) -> Fixed:
    """Compute the reference's and the proximal policy's numbers, in micro-batches of like length."""
    whole = collate([(r.prompt, r.response) for r in rollouts]).to(trunk.device)
    temperature = torch.tensor([[r.temperature] for r in rollouts], device=trunk.device)
    prox, ref, kl, entropy = (torch.zeros(whole.mask.shape, device=trunk.device) for _ in range(4))
    hidden = None
    for rows, part in micro_batches(whole, torch.arange(len(rollouts))):
        width = part.mask.shape[1]
        reference = trunk.respond(part, temperature[rows], "reference")
        if hidden is None:
            shape = (len(rollouts), whole.mask.shape[1] + 1, reference.hidden.shape[-1])
            hidden = torch.zeros(shape, device=trunk.device)
        hidden[rows, : width + 1] = reference.hidden.float()
        ref[rows, :width] = reference.logprobs
        entropy[rows, :width] = ppo.exact_entropy(reference.logits, temperature[rows])
        policy = trunk.respond(part, temperature[rows], "policy")
        prox[rows, :width] = policy.logprobs
        kl[rows, :width] = ppo.exact_kl(policy.logits, reference.logits, temperature[rows])
    assert hidden is not None
    old = pad([r.logprobs for r in rollouts]).to(trunk.device, torch.float32)
    return Fixed(whole, temperature, old, prox, ref, kl, entropy, hidden)


class Moved(NamedTuple):
    """What has become of the policy in the states of the rollouts; (B, T), 0 in padding."""

    logprobs: Tensor
    kl: Tensor  # from the reference, exact in each state
    entropy: Tensor  # exact in each state, nats


@torch.no_grad()
def measure_policy(trunk: Trunk, fixed: Fixed) -> Moved:
    """Return where the policy is now."""
    moved = Moved(*(torch.zeros_like(fixed.ref_logprobs) for _ in range(3)))
    for rows, part in micro_batches(fixed.batch, torch.arange(len(fixed.ref_logprobs))):
        width, temperature = part.mask.shape[1], fixed.temperature[rows]
        policy = trunk.respond(part, temperature, "policy")
        ref_logits = trunk.logits(fixed.hidden[rows, :width])
        measured = Moved(
            policy.logprobs,
            ppo.exact_kl(policy.logits, ref_logits, temperature),
            ppo.exact_entropy(policy.logits, temperature),
        )
        for whole, of_part in zip(moved, measured, strict=True):
            whole[rows, :width] = of_part.masked_fill(~part.mask, 0.0)
    return moved


@torch.no_grad()
def response_logprobs(trunk: Trunk, rollouts: Sequence[Rollout]) -> Tensor:
    """Return the policy's log-probability of each whole response (B,), on the CPU; none for no rollouts."""
    if not rollouts:
        return torch.zeros(0)
    batch = collate([(r.prompt, r.response) for r in rollouts]).to(trunk.device)
    temperature = torch.tensor([[r.temperature] for r in rollouts], device=trunk.device)
    total = torch.zeros(len(rollouts))
    for rows, part in micro_batches(batch, torch.arange(len(rollouts))):
        policy = trunk.respond(part, temperature[rows], "policy")
        total[rows] = of_responses(policy.logprobs, part.mask).cpu()
    return total


def of_responses(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the log-probability of each whole response (B,), from those of its tokens (B, T)."""
    return logprobs.masked_fill(~mask, 0.0).sum(dim=1)


def micro_batches(batch: Batch, rows: Tensor) -> Iterator[tuple[Tensor, Batch]]:
    """Yield these rows of a batch in groups of like length: which they are, and the rows themselves."""
    for indices in by_length(batch.positions[rows, -1].tolist(), MICRO_BATCH):
        part_rows = rows[indices]
        yield part_rows, shrink(batch, part_rows)


def shrink(batch: Batch, rows: Tensor) -> Batch:
    """Return some rows of a batch without the padding that only the others needed."""
    mask = batch.mask[rows]
    width = int(mask.sum(dim=1).max())
    length = int(batch.positions[rows].max()) + 1
    return Batch(
        tokens=batch.tokens[rows, :length],
        positions=batch.positions[rows, : width + 1],
        responses=batch.responses[rows, :width],
        mask=mask[:, :width],
    )
