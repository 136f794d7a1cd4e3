"""Fitting the reward model to thumbs: binary cross-entropy on the verdict logit.

`sigmoid(reward)` is the probability of a thumb up. Only shown replies are rated, so thumbs are
weighted by the inverse of the probability with which their reply was shown.
"""

from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor
from torch.nn import functional as F

from thumbloop.config.trainer import RewardFit
from trainer.evidence import Evidence, held_out_auroc, pool
from trainer.models import Trunk
from trainer.ppo import NotFinite
from trainer.rollouts import Batch, Rollout, Thumb, by_length, collate

MICRO_BATCH = 32
FOLDS = 4


def thumb_weights(thumbs: Sequence[Thumb], *, max_weight: float, max_user_share: float) -> Tensor:
    """Weigh thumbs (N,) by inverse propensity: self-normalised, clipped, no user above a share.

    The mean is 1 before the clip and the cap, at most 1 after: neither is scaled up again.

    Clipped and self-normalised as in Swaminathan & Joachims 2015 (NeurIPS, eq. 8). A thumb without
    propensity weighs 1: no correction is claimed for it.
    """
    known = [1 / t.propensity for t in thumbs if t.propensity is not None]
    mean = sum(known) / len(known) if known else 1.0
    weights = [
        1.0 if t.propensity is None else min(1 / t.propensity / mean, max_weight) for t in thumbs
    ]
    totals: dict[str, float] = defaultdict(float)
    for thumb, weight in zip(thumbs, weights, strict=True):
        totals[thumb.user] += weight
    cap = user_cap(list(totals.values()), max_user_share)
    capped = [w * min(1.0, cap / totals[t.user]) for t, w in zip(thumbs, weights, strict=True)]
    return torch.tensor(capped)


def user_cap(totals: Sequence[float], share: float) -> float:
    """Return the largest total weight of one user that is at most a share of what is then left.

    With fewer than 1 / share users no such total exists: then all users weigh the same.
    """
    largest_first = sorted(totals, reverse=True)
    for capped, total in enumerate(largest_first):
        if capped * share >= 1:
            break
        cap = share * sum(largest_first[capped:]) / (1 - capped * share)
        if total <= cap:
            return cap
    return largest_first[-1]


def fit(
    trunk: Trunk,
    thumbs: Sequence[Thumb],
    weights: Tensor,
    settings: RewardFit,
    generator: torch.Generator,
) -> float:
    """Train the reward adapter from where it stands; return the last epoch's mean loss."""
    parameters = list(trunk.parameters("reward").values())
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    loss = torch.tensor(0.0)
    for _ in range(settings.epochs):
        order = torch.randperm(len(thumbs), generator=generator)
        losses = [
            _step(trunk, optimizer, [thumbs[int(i)] for i in rows], weights[rows])
            for rows in order.split(settings.batch_size)
        ]
        loss = torch.stack(losses).mean()
    return float(loss)


def _step(
    trunk: Trunk, optimizer: torch.optim.Optimizer, thumbs: Sequence[Thumb], weights: Tensor
) -> Tensor:
    """Descend once on one batch of thumbs."""
    rewards = trunk.rewards(_verdict_batch(trunk, thumbs).to(trunk.device))
    targets = torch.tensor([float(t.is_up) for t in thumbs], device=trunk.device)
    losses = F.binary_cross_entropy_with_logits(rewards, targets, reduction="none")
    loss = (losses * weights.to(trunk.device)).mean()
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, 1.0)):
        raise NotFinite("the reward model's gradient is not finite")
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def score(trunk: Trunk, replies: Sequence[Thumb | Rollout]) -> Tensor:
    """Return the reward of each reply (N,), in logits, on the CPU."""
    rewards = torch.zeros(len(replies))
    lengths = [len(reply.prompt) + len(reply.response) for reply in replies]
    for rows in by_length(lengths, MICRO_BATCH):
        batch = _verdict_batch(trunk, [replies[i] for i in rows])
        rewards[rows] = trunk.rewards(batch.to(trunk.device)).cpu()
    return rewards


def evidence_on(trunk: Trunk, thumbs: Sequence[Thumb]) -> Evidence:
    """Return how well the reward model ranks thumbs; held out if it was not fitted on them."""
    return held_out_auroc(score(trunk, thumbs).tolist(), [t.is_up for t in thumbs])


def cross_fitted(
    trunk: Trunk, thumbs: Sequence[Thumb], settings: RewardFit, generator: torch.Generator
) -> Evidence:
    """Try what a fit learns where there is no parent to try: users in folds, each held out once.

    Leaves the reward adapter as it was.
    """
    start = trunk.snapshot("reward")
    folds = user_folds(thumbs)
    parts = []
    for held_out in range(FOLDS):
        rest = [t for t, fold in zip(thumbs, folds, strict=True) if fold != held_out]
        unseen = [t for t, fold in zip(thumbs, folds, strict=True) if fold == held_out]
        if rest and unseen:
            weights = thumb_weights(
                rest, max_weight=settings.max_weight, max_user_share=settings.max_user_share
            )
            fit(trunk, rest, weights, settings, generator)
            parts.append(evidence_on(trunk, unseen))
            trunk.restore("reward", start)
    return pool(parts)


def user_folds(thumbs: Sequence[Thumb]) -> list[int]:
    """Split thumbs in folds, users kept whole; too few users' thumbs are dealt out one by one."""
    users = sorted({t.user for t in thumbs}, key=lambda user: sha256(user.encode()).digest())
    if len(users) < FOLDS:
        return [i % FOLDS for i in range(len(thumbs))]
    fold = {user: i % FOLDS for i, user in enumerate(users)}
    return [fold[t.user] for t in thumbs]


def _verdict_batch(trunk: Trunk, replies: Sequence[Thumb | Rollout]) -> Batch:
    return collate([(r.prompt, (*r.response, *trunk.verdict.prompt)) for r in replies])
