"""Rewards that need no model, the same for the server, which ranks by them, and the trainer."""

import re

FORMAT_PENALTY = 1.0
"""Of a reply that has not the form that is wanted, a logit."""


def length_reward(tokens: int, *, target_tokens: int, scale_tokens: float) -> float:
    """Return minus the distance from the length that is wanted, in units of `scale_tokens`; at most 0."""
    return -abs(tokens - target_tokens) / scale_tokens


def format_reward(text: str, pattern: str) -> float:
    """Return 0 for a reply that matches the pattern as a whole, minus FORMAT_PENALTY for any other."""
    return 0.0 if re.fullmatch(pattern, text, re.DOTALL) else -FORMAT_PENALTY
