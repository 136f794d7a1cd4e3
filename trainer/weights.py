"""How much each thumb and each comparison counts in the fit of the reward model."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from thumbloop.config.trainer import RewardFit
from trainer.crowd import user_cap
from trainer.rollouts import Judgement, Thumb


def weigh(judgements: Sequence[Judgement], settings: RewardFit) -> Tensor:
    """Weigh judgements (N,): by inverse propensity, self-normalised and clipped; no user above a share.

    The mean is 1 before the clip and the cap, at most 1 after: neither is scaled up again.

    Clipped and self-normalised as in Swaminathan & Joachims 2015 (NeurIPS, eq. 8). A thumb without
    propensity weighs 1: no correction is claimed for it. A comparison is not of the shown reply alone,
    so there is nothing to correct.
    """
    inverse = [_inverse_propensity(each) for each in judgements]
    known = [x for x in inverse if x is not None]
    mean = sum(known) / len(known) if known else 1.0
    weights = [
        settings.preference_weight
        if not isinstance(each, Thumb)
        else 1.0
        if x is None or not settings.propensity_weights
        else min(x / mean, settings.max_weight)
        for each, x in zip(judgements, inverse, strict=True)
    ]
    totals: dict[str, float] = defaultdict(float)
    for each, weight in zip(judgements, weights, strict=True):
        totals[each.user] += weight
    counted = [total for total in totals.values() if total > 0]
    cap = user_cap(counted, settings.max_user_share) if counted else 0.0
    return torch.tensor(
        [
            weight * min(1.0, cap / totals[each.user]) if weight else 0.0
            for each, weight in zip(judgements, weights, strict=True)
        ]
    )


def _inverse_propensity(judgement: Judgement) -> float | None:
    if not isinstance(judgement, Thumb) or judgement.propensity is None:
        return None
    return 1 / judgement.propensity
