"""When a round is due: pure functions of what the store says."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from thumbloop.config.trainer import Round
from thumbloop.types import WAITING, PolicyVersion, VersionState


def awaited(known: Iterable[PolicyVersion], current: PolicyVersion) -> PolicyVersion | None:
    """Return the newest child of the current version that the server is about to try.

    While a canary is on trial there is none: what comes meanwhile waits for its end, or for a newer one.
    """
    children = [v for v in known if v.parent == current.version]
    if any(v.state is VersionState.CANARY for v in children):
        return None
    waiting = (v for v in children if v.state in WAITING)
    return max(waiting, key=lambda v: v.version, default=None)


def needed_feedback(
    rounds: Iterable[Mapping[Any, Any]],
    current: PolicyVersion,
    settings: Round,
    *,
    now: float,
) -> int:
    """Return how much new feedback starts the next round; `now` in unix seconds.

    A round that was blocked, or whose version did not come to serve, gives its thumbs back; trying
    the same ones again would end the same way, so half a round's worth has to join them. What was tried
    longer ago than feedback may be old is there no more.
    """
    oldest = settings.oldest_feedback(now)
    enough = settings.min_feedback if current.reward_digest else settings.first_feedback
    tried = [
        int(r["metrics"].get("feedback_new", r["metrics"].get("feedback_used", 0)))
        for r in rounds
        if r["parent"] == current.version and r["finished_at"] >= oldest
    ]
    return max(tried) + math.ceil(enough / 2) if tried else enough


def looks(
    rounds: Iterable[Mapping[Any, Any]], known: Iterable[PolicyVersion], parent: PolicyVersion
) -> int:
    """Return how many rounds there were from the parent and its ancestors, published or not."""
    parents = {v.version: v.parent for v in known}
    line: set[int] = set()
    ancestor: int | None = parent.version
    while ancestor is not None:
        line.add(ancestor)
        ancestor = parents[ancestor]
    return sum(r["parent"] in line for r in rounds)
