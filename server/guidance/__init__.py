"""Guidance: one strategy per file, each a pure choice function plus a small driver."""

from server.guidance.none import NoGuidance
from server.guidance.outcome import Choice, Guidance, Outcome
from server.guidance.soft_best_of_n import SoftBestOfN
from thumbloop.types import Strategy

STRATEGIES: dict[Strategy, Guidance] = {
    Strategy.NONE: NoGuidance(),
    Strategy.SOFT_BEST_OF_N: SoftBestOfN(),
}

__all__ = ["STRATEGIES", "Choice", "Guidance", "Outcome"]
