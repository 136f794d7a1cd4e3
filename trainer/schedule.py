"""When a round is due: pure functions of what the store says."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from thumbloop.config.trainer import Round
from thumbloop.types import WAITING, PolicyVersion, VersionState


def awaited(known: Iterable[PolicyVersion], parent: PolicyVersion) -> PolicyVersion | None:
    """Return the newest child of the version that is learned from, if the server is about to try it.

    While a canary is on trial there is none: what comes meanwhile waits for its end, or for a newer one.
    """
    known = list(known)
    if any(v.state is VersionState.CANARY for v in known):
        return None
    waiting = (v for v in known if v.parent == parent.version and v.state in WAITING)
    return max(waiting, key=lambda v: v.version, default=None)


def needed_feedback(
    rounds: Iterable[Mapping[Any, Any]],
    parent: PolicyVersion,
    settings: Round,
    *,
    now: float,
) -> int:
    """Return how much new feedback starts the next round on a parent; `now` in unix seconds.

    A round that was blocked, or whose version did not come to serve, gives its thumbs back; trying
    the same ones again would end the same way, so half a round's worth has to join them. What was tried
    longer ago than feedback may be old is there no more.
    """
    oldest = settings.oldest_feedback(now)
    enough = settings.min_feedback if parent.reward_digest else settings.first_feedback
    tried = [
        int(r["metrics"].get("feedback_new", r["metrics"].get("feedback_used", 0)))
        for r in rounds
        if r["parent"] == parent.version and r["finished_at"] >= oldest
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
