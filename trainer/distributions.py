"""From hidden states to what a policy says of each token, a bounded number of logits at a time."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer import ppo

LOGITS_BYTES = 1 << 27
"""Logits that are held at a time, float32: those of a vocabulary of 150,000 words for 220 tokens."""


class Said(NamedTuple):
    """What a policy says of M tokens; all (M,), nats."""

    logprobs: Tensor
    entropy: Tensor  # exact, of the state before it, no gradient; 0 where it is not asked for
    kl: Tensor  # from the reference, exact in that state; 0 where none is given


def describe_tokens(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    ref_hidden: Tensor | None = None,
    *,
    vocabulary: int,
    has_entropy: bool = False,
) -> Said:
    """Describe tokens (M,) by the hidden states before them (M, H) at temperatures (M,).

    `ref_hidden` (M, H) is the reference's. With more logits than may be held at a time they are made in
    parts, and for a gradient made again.
    """
    size = max(1, LOGITS_BYTES // (4 * vocabulary))
    columns = [hidden, tokens, temperature, *([] if ref_hidden is None else [ref_hidden])]
    parts = list(zip(*(x.split(size) for x in columns), strict=True))
    describe = partial(_describe, logits_of, has_entropy)
    if len(parts) == 1:
        return Said(*describe(*parts[0]))
    described = [checkpoint(describe, *part, use_reentrant=False) for part in parts]
    return Said(*(torch.cat(x) for x in zip(*described, strict=True)))


def _describe(
    logits_of: Callable[[Tensor], Tensor],
    has_entropy: bool,
    hidden: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    ref_hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    distribution = ppo.log_distribution(logits_of(hidden), temperature)
    logprobs = ppo.token_logprobs(distribution, tokens)
    nothing = torch.zeros_like(logprobs, requires_grad=False)
    entropy = ppo.exact_entropy(distribution.detach()) if has_entropy else nothing
    if ref_hidden is None:
        return logprobs, entropy, nothing
    with torch.no_grad():
        reference = ppo.log_distribution(logits_of(ref_hidden), temperature)
    return logprobs, entropy, ppo.exact_kl(distribution, reference)
