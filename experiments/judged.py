"""How good reward models are, on random candidates of their own policies, judged without noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trainer.calibration import calibration_error
from trainer.evidence import held_out_auroc, pool


@dataclass(frozen=True, slots=True)
class JudgedRewards:
    """What one reward model says of candidates, and what is true of them; all (N,)."""

    rewards: list[float]
    claims: list[float]  # probabilities of a thumb up
    likes: list[float]  # probabilities of being liked, before anybody slips


class Quality(NamedTuple):
    """Ranking pooled over reward models by precision, calibration error of all claims, and on how many candidates."""

    auroc: float
    calibration_error: float
    candidates: int


def quality(judged: Sequence[JudgedRewards], noise: float) -> Quality:
    """Return how good reward models are together; `noise` is the share of thumbs that are slips.

    A claim is about thumbs, so what it is held against is the probability of a thumb up, slips counted.
    """
    evidence = pool([held_out_auroc(j.rewards, [like > 0.5 for like in j.likes]) for j in judged])
    claims = [p for j in judged for p in j.claims]
    truths = [with_slips(like, noise) for j in judged for like in j.likes]
    error = calibration_error(claims, truths) if claims else float("nan")
    return Quality(evidence.auroc, error, len(claims))


def with_slips(likes: float, noise: float) -> float:
    """Return the probability of a thumb up from that of being liked; `noise` is the share of slips."""
    return likes * (1 - noise) + (1 - likes) * noise
