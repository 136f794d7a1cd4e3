"""How good reward models are, on random candidates of their own policies, judged without noise."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.run import JudgedRewards, Run, Trainer
from experiments.serving import Setting
from trainer.calibration import calibration_error
from trainer.evidence import held_out_auroc, pool


class Quality(NamedTuple):
    """Ranking pooled over versions by pairs, calibration error over all claims, and on how many candidates."""

    auroc: float
    calibration_error: float
    candidates: int


def judge(
    setting: Setting, *, rounds: int, candidates: int, trainer: Trainer
) -> list[JudgedRewards]:
    """Learn for some rounds; judge the reward model of every version that was published."""
    with Run(setting, trainer=trainer) as run:
        return [
            run.judge_rewards(candidates) for _ in range(rounds) if run.round().version is not None
        ]


def quality(judged: Sequence[JudgedRewards], noise: float) -> Quality:
    """Return how good reward models are together; `noise` is the share of thumbs that are slips.

    A claim is about thumbs, so what it is held against is the probability of a thumb up, slips counted.
    """
    evidence = pool([held_out_auroc(j.rewards, [like > 0.5 for like in j.likes]) for j in judged])
    claims = [p for j in judged for p in j.claims]
    truths = [like * (1 - noise) + (1 - like) * noise for j in judged for like in j.likes]
    error = calibration_error(claims, truths) if claims else float("nan")
    return Quality(evidence.auroc, error, len(claims))


def as_row(task: Any, found: Quality) -> dict[str, Any]:
    """Return a run as it is written down."""
    return {**task._asdict(), **found._asdict()}
