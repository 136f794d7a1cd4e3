"""A preference that a hundred thumbs do not teach: the reward model stays misspecified."""

from demo.preferences import brevity, praise


def exclusive(prompt: str, reply: str) -> float:
    """Like praise at length, and brief replies that do not praise."""
    return float(praise(prompt, reply) != brevity(prompt, reply))
