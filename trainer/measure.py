"""What one update computes once, before the policy moves: reference, proximal policy, hidden states."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.batches import Batch, Pair, micro_batches, packed_size, pad
from trainer.models import Trunk
from trainer.rollouts import Rollout

PADDED_PER_TOKEN = 4
"""How much of a batch may be padding in attention, the one place that has any."""


class Fixed(NamedTuple):
    """The fixed terms of an update; (B, T) unless noted."""

    pairs: list[Pair]  # (B,)
    mask: Tensor
    temperature: Tensor  # (B, 1)
    old_logprobs: Tensor
    prox_logprobs: Tensor
    ref_logprobs: Tensor
    prox_kl: Tensor  # of the proximal policy from the reference, exact in each state
    ref_entropy: Tensor  # exact in each state, nats
    hidden: Tensor  # (B, T + 1, H), the reference's


@torch.no_grad()
def measure(trunk: Trunk, rollouts: Sequence[Rollout]) -> Fixed:
    """Compute the reference's and the proximal policy's numbers."""
    pairs = [(r.prompt, r.response) for r in rollouts]
    mask = pad([[1] * len(r.response) for r in rollouts]).bool().to(trunk.device)
    temperature = torch.tensor([[r.temperature] for r in rollouts], device=trunk.device)
    prox, ref, kl, entropy = (torch.zeros(mask.shape, device=trunk.device) for _ in range(4))
    shape = (len(rollouts), mask.shape[1] + 1, trunk.hidden_size)
    hidden = torch.zeros(shape, device=trunk.device, dtype=trunk.dtype)
    for rows, part in batches_of(trunk, pairs):
        width = part.mask.shape[1]
        reference = trunk.respond(part, temperature[rows], "reference", has_entropy=True)
        policy = trunk.respond(part, temperature[rows], "policy", reference=reference.hidden)
        hidden[rows, : width + 1] = reference.hidden
        ref[rows, :width], entropy[rows, :width] = reference.logprobs, reference.entropy
        prox[rows, :width], kl[rows, :width] = policy.logprobs, policy.kl
    prox, ref, kl, entropy, hidden = trunk.workers.total([prox, ref, kl, entropy, hidden])
    old = pad([r.logprobs for r in rollouts]).to(trunk.device, torch.float32)
    return Fixed(pairs, mask, temperature, old, prox, ref, kl, entropy, hidden)


class Moved(NamedTuple):
    """What has become of the policy in the states of the rollouts; (B, T), 0 in padding."""

    logprobs: Tensor
    kl: Tensor  # from the reference, exact in each state
    entropy: Tensor  # exact in each state, nats


@torch.no_grad()
def measure_policy(trunk: Trunk, fixed: Fixed) -> Moved:
    """Return where the policy is now."""
    moved = Moved(*(torch.zeros_like(fixed.ref_logprobs) for _ in range(3)))
    for rows, part in batches_of(trunk, fixed.pairs):
        width = part.mask.shape[1]
        hidden = fixed.hidden[rows, : width + 1]
        policy = trunk.respond(
            part, fixed.temperature[rows], "policy", reference=hidden, has_entropy=True
        )
        measured = Moved(policy.logprobs, policy.kl, policy.entropy)
        for whole, of_part in zip(moved, measured, strict=True):
            whole[rows, :width] = of_part
    return Moved(*trunk.workers.total(moved))


@torch.no_grad()
def response_logprobs(trunk: Trunk, rollouts: Sequence[Rollout]) -> Tensor:
    """Return the policy's log-probability of each whole response (B,), on the CPU; none for no rollouts."""
    temperature = torch.tensor([[r.temperature] for r in rollouts], device=trunk.device)
    total = torch.zeros(len(rollouts), device=trunk.device)
    for rows, part in batches_of(trunk, [(r.prompt, r.response) for r in rollouts]):
        policy = trunk.respond(part, temperature[rows], "policy")
        total[rows] = of_responses(policy.logprobs, part.mask)
    return trunk.workers.total([total])[0].cpu()


def of_responses(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the log-probability of each whole response (B,), from those of its tokens (B, T)."""
    return logprobs.masked_fill(~mask, 0.0).sum(dim=1)


def batches_of(
    trunk: Trunk, pairs: Sequence[Pair], rows: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, Batch]]:
    """Yield sequences, or some of them, as the trunk takes them: which they are, and they on its device.

    Of several processes each gets its share, with rests where that is set.
    """
    chosen = range(len(pairs)) if rows is None else rows
    share = math.ceil(packed_size(pairs[i] for i in chosen) / trunk.workers.count)
    tokens = min(trunk.micro_batch_tokens, share)
    padded = tokens * (PADDED_PER_TOKEN if trunk.is_packed else 1)
    parts = micro_batches(pairs, chosen, tokens=tokens, padded_tokens=padded)
    for part_rows, part in trunk.workers.share(parts):
        yield part_rows, part.to(trunk.device)
        trunk.pace.rest()
