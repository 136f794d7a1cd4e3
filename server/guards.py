"""What guards look at: one number in [0, 1] of a reply, higher where it is worse."""

import math
import re
from collections.abc import Sequence

from server.trial import LENGTH

ERRORS = "errors"
LATENCY = "latency"
REPETITION = "repetition"
REFUSALS = "refusals"
DIVERGENCE = "divergence"
OF_TEXT = (LENGTH, REPETITION, REFUSALS)
GUARDS = (ERRORS, LATENCY, *OF_TEXT, DIVERGENCE)
_NGRAM = 4


def saturated(value: float, typical: float) -> float:
    """Return a length or a time on a scale where a typical one is 1/2, and twice that is 2/3.

    Both are above 0.
    """
    return value / (value + typical)


def repetition(token_ids: Sequence[int]) -> float:
    """Return the share of 4-grams that came before: seq-rep-4 of Welleck et al. 2020, "Neural text
    generation with unlikelihood training", section 6.1; 0 for a reply of fewer tokens.
    """
    ngrams = list(zip(*(token_ids[start:] for start in range(_NGRAM)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def is_refusal(text: str, pattern: str) -> bool:
    """Say whether a reply declines what was asked, by the words that it begins with.

    Lists of such words are how refusals are counted: Zou et al. 2023, "Universal and transferable
    adversarial attacks on aligned language models", appendix B.
    """
    return re.match(pattern, text.lstrip(), re.IGNORECASE) is not None


def divergence(promise: float, thumb: int) -> float:
    """Return how much more the reward model promised than the user said: 1 for a thumb down to a reply
    of which it was sure, 0 for the contrary. `promise` is the logit of a thumb up, `thumb` 0 or 1.
    """
    promised = 1 / (1 + math.exp(-max(promise, -700.0)))
    return (1 + promised - thumb) / 2
