"""How much each thumb and each comparison counts in the fit of the reward model."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from thumbloop.config.trainer import RewardFit
from trainer.crowd import most_of_a_user, user_cap
from trainer.rollouts import Judgement, Thumb


def weigh(
    judgements: Sequence[Judgement], settings: RewardFit, known: Sequence[Judgement] | None = None
) -> Tensor:
    """Weigh judgements (N,): by inverse propensity, self-normalised and clipped; no user above others.

    The mean is 1 before the clip and the caps, at most 1 after: none is scaled up again. `known` is all that
    judgements are drawn from, themselves unless told otherwise: who is in every draw has several times the
    average user's say, though no draw shows it.

    Clipped and self-normalised as in Swaminathan & Joachims 2015 (NeurIPS, eq. 8). A thumb without
    propensity weighs 1: no correction is claimed for it. A comparison is not of the shown reply alone,
    so there is nothing to correct.
    """
    inverse = [_inverse_propensity(each) for each in judgements]
    stated = [x for x in inverse if x is not None]
    mean = sum(stated) / len(stated) if stated else 1.0
    weights = [
        settings.preference_weight
        if not isinstance(each, Thumb)
        else 1.0
        if x is None or not settings.propensity_weights
        else min(x / mean, settings.max_weight)
        for each, x in zip(judgements, inverse, strict=True)
    ]
    given = Counter(each.user for each in (judgements if known is None else known))
    most = most_of_a_user(given.values(), settings.max_user_factor)
    weights = [
        weight * min(1.0, most / given[each.user])
        for each, weight in zip(judgements, weights, strict=True)
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
