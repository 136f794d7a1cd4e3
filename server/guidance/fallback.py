"""What to show when rewards are missing: the finished candidate the policy finds most likely."""

from collections.abc import Sequence

from server.guidance.outcome import Outcome, settle
from thumbloop.types import Arm, Candidate, Extent, FinishReason


def most_likely(
    candidates: Sequence[Candidate],
    reason: str,
    *,
    extent: Extent = Extent.REQUESTED,
    selected: str = "",
) -> Outcome:
    """Choose by the mean log-probability per token; claims no propensity for anybody.

    A candidate that was aborted is shown only where none has finished.
    """
    best = max(range(len(candidates)), key=lambda i: _rank(candidates[i]))
    return settle(
        candidates,
        best,
        [None] * len(candidates),
        arm=Arm.FALLBACK,
        reranked=False,
        extent=extent,
        fallback=reason,
        selected=selected,
    )


def _rank(candidate: Candidate) -> tuple[bool, bool, float]:
    mean = sum(candidate.logprobs) / max(len(candidate.logprobs), 1)
    is_finished = candidate.finish_reason is not FinishReason.ABORTED
    return is_finished, is_finished or bool(candidate.token_ids), mean
