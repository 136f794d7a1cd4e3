"""Guidance: one strategy per file, each a pure choice function plus a small driver.

A module of this package that has a `STRATEGY` is a strategy; nothing else has to be told about it.
"""

from server.guidance.outcome import Checkpoint, Choice, Enough, Guidance, NotScored, Outcome
from server.guidance.registry import find_strategies

__all__ = [
    "Checkpoint",
    "Choice",
    "Enough",
    "Guidance",
    "NotScored",
    "Outcome",
    "find_strategies",
]
