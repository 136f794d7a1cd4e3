"""What to show when rewards are missing: the candidate the policy itself finds most likely."""

from collections.abc import Sequence

from server.guidance.outcome import Outcome, settle
from thumbloop.types import Arm, Candidate


def most_likely(candidates: Sequence[Candidate]) -> Outcome:
    """Choose by the mean log-probability per token; claims no propensity for anybody."""
    best = max(range(len(candidates)), key=lambda i: _mean_logprob(candidates[i]))
    unknown = [None] * len(candidates)
    return settle(candidates, best, unknown, arm=Arm.FALLBACK, reranked=False)


def _mean_logprob(candidate: Candidate) -> float:
    return sum(candidate.logprobs) / max(len(candidate.logprobs), 1)
