"""What an update did to the policy, as far as the rollouts of its parent can tell: no reply is generated.

What is a mean over tokens is exact in the states of the rollouts; what is of whole replies is estimated
by weights, child over sampler.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from trainer import ppo
from trainer.measure import Fixed, Moved, of_responses
from trainer.off_policy import effective_share, ratios
from trainer.rollouts import Rollout

MAX_RATIO = 10.0
"""Most that one reply may count of another policy's."""


def describe_parent(
    fixed: Fixed, rollouts: Sequence[Rollout], likes: Sequence[float], parent: int
) -> dict[str, float]:
    """Return what the rollouts say of the parent: KL per reply, and where they are its own, entropy,
    lengths, repetition, and the sampler's faith per token; nats.

    likes (B,): how likely each reply is liked, as the round's reward model says; empty where nothing asked it.
    """
    mask = fixed.mask
    described = {
        "mean_reply_tokens": float(mask.sum(dim=1).float().mean()),
        "parent_kl_to_reference": float(fixed.prox_kl[mask].sum()) / len(mask),
        "reference_entropy": float(ppo.masked_mean(fixed.ref_entropy, mask)),
        **_of_replies(rollouts, likes, _weights(fixed.prox_logprobs, fixed, rollouts), "parent"),
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


def describe_child(
    fixed: Fixed, moved: Moved, rollouts: Sequence[Rollout], likes: Sequence[float]
) -> dict[str, float]:
    """Return what they say of the policy that has moved; likes as for the parent."""
    weights = _weights(moved.logprobs, fixed, rollouts)
    return {
        "kl_to_reference": float(moved.kl.sum()) / len(rollouts),
        "child_entropy": float(ppo.masked_mean(moved.entropy, fixed.mask)),
        "child_effective_share": effective_share(weights),
        **_of_replies(rollouts, likes, weights, "child"),
    }


def repetition(response: Sequence[int]) -> float:
    """Return the share of a response's bigrams that it has said before, in [0, 1)."""
    said = Counter(pairwise(response))
    return 1 - len(said) / said.total() if said else 0.0


def _weights(logprobs: Tensor, fixed: Fixed, rollouts: Sequence[Rollout]) -> np.ndarray:
    """Return the weight of each finished reply (N,): those that were cut say nothing of whole ones."""
    finished = torch.tensor([r.is_finished for r in rollouts])
    now, then = (
        of_responses(x, fixed.mask).double().cpu()[finished].numpy()
        for x in (logprobs, fixed.old_logprobs)
    )
    return ratios(now, then, most=MAX_RATIO)


def _of_replies(
    rollouts: Sequence[Rollout], likes: Sequence[float], weights: np.ndarray, whose: str
) -> dict[str, float]:
    """Return the weighted means over whole replies; nothing where no reply has any weight."""
    whole = [r for r in rollouts if r.is_finished]
    if not weights.any():
        return {}
    facts: dict[str, list[float]] = {
        "reply_tokens": [float(len(r.response)) for r in whole],
        "unended_share": [float(not r.has_eos) for r in whole],
        "repetition": [repetition(r.response) for r in whole],
    }
    if likes:
        pairs = zip(rollouts, likes, strict=True)
        facts["predicted_rate"] = [p for r, p in pairs if r.is_finished]
    return {
        f"{whose}_{name}": float(np.average(values, weights=weights))
        for name, values in facts.items()
    }
