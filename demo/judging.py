"""What a policy's replies to held-out prompts are worth; plain Python, so that any environment can judge."""

from collections.abc import Sequence
from typing import NamedTuple

from demo.grammar import is_well_formed
from demo.preferences import load_preference


class Judged(NamedTuple):
    """Means over replies, in [0, 1]: liked without noise, well-formed, and both at once."""

    liked: float
    well_formed: float
    both: float


def judge(preference: str, prompts: Sequence[str], replies: Sequence[str]) -> Judged:
    """Judge a reply to each prompt by a preference. Raises ValueError: there is no such preference."""
    prefers = load_preference(preference)
    liked = [prefers(*each) for each in zip(prompts, replies, strict=True)]
    formed = [is_well_formed(reply) for reply in replies]
    both = [like * is_formed for like, is_formed in zip(liked, formed, strict=True)]
    return Judged(*(sum(of) / len(replies) for of in (liked, formed, both)))


def columns(judged: Sequence[Judged]) -> dict[str, list[float]]:
    """Return what was found one time after another, by name."""
    return {name: [getattr(each, name) for each in judged] for name in Judged._fields}
