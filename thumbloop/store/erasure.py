"""Forgetting a user: what was said goes, that it was learned from stays.

The exact record of what rounds used is kept: it holds ids alone. Events say how much was erased and when, never whose.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Column, Connection, delete, func, insert, select

from thumbloop import lines
from thumbloop.store import lineage, versions
from thumbloop.store.database import hold_off_trainer
from thumbloop.store.interactions import batches
from thumbloop.store.schema import events, feedback, interactions, preferences
from thumbloop.store.versions import TAINTED
from thumbloop.types import Round, User

ERASED = "erased"
"""Kind of the event that a user's rows were deleted."""
SCRUBBED = "scrubbed"
"""Kind of the event that the store's files hold nothing any more of what was deleted before."""
_WHY_TAINTED = "learned from data that was erased"


class Erasure(NamedTuple):
    """What was erased: replies, thumbs and preferences; and the versions that had learned from it, with descendants."""

    interactions: int
    feedback: int
    tainted: tuple[int, ...]


def erase(connection: Connection, policy: str, user: User, *, at: float, actor: str) -> Erasure:
    """Delete a user's prompts, replies and feedback, and taint the versions that learned from them.

    A round that has read them and is not published yet will not be: see is_whole. Done again, it finds nothing.
    """
    hold_off_trainer(connection)
    learned = list(lineage.learned_from(connection, policy, user))
    whose = interactions.c.subject == user.subject, interactions.c.user_id == user.user_id
    replies = select(interactions.c.response_id).where(interactions.c.policy == policy, *whose)
    said = sum(
        connection.scalar(
            select(func.count()).select_from(table).where(table.c.response_id.in_(replies))
        )
        or 0
        for table in (feedback, preferences)
    )
    gone = connection.execute(
        delete(interactions).where(interactions.c.policy == policy, *whose)
    ).rowcount
    if not gone:
        return Erasure(0, 0, ())
    known = versions.list_versions(connection, policy, has_metrics=False)
    tainted = sorted({*learned, *lines.descendants(known, learned)})
    _log(connection, policy, ERASED, at, actor, {"replies": gone, "feedback": said})
    _taint(connection, policy, learned, at, actor)
    return Erasure(gone, said, tuple(tainted))


def _taint(
    connection: Connection, policy: str, numbers: Sequence[int], at: float, actor: str
) -> None:
    """Mark versions whose own rounds learned from what is gone, each once."""
    marked = select(events.c.version).where(events.c.policy == policy, events.c.kind == TAINTED)
    for number in sorted(set(numbers) - set(connection.scalars(marked))):
        _log(connection, policy, TAINTED, at, actor, {"reason": _WHY_TAINTED}, number)


def _log(
    connection: Connection,
    policy: str,
    kind: str,
    at: float,
    actor: str,
    detail: dict[str, Any],
    version: int | None = None,
) -> None:
    connection.execute(
        insert(events).values(
            at=at, kind=kind, policy=policy, version=version, actor=actor, detail=detail
        )
    )


def is_whole(connection: Connection, done: Round) -> bool:
    """Say whether all that a round used is still there; what was erased meanwhile may teach nobody."""
    return all(
        _count(connection, column, ids) == len(ids)
        for column, ids in (
            (feedback.c.id, {*done.new_feedback, *done.replayed_feedback}),
            (preferences.c.id, {*done.new_preferences, *done.replayed_preferences}),
            (interactions.c.response_id, set(done.rollouts)),
        )
    )


def _count(connection: Connection, column: Column[Any], ids: Iterable[int | str]) -> int:
    """Return how many of these rows there are."""
    found = (
        connection.scalar(select(func.count()).where(column.in_(batch))) for batch in batches(ids)
    )
    return sum(number or 0 for number in found)


def unscrubbed(connection: Connection) -> int | None:
    """Return the latest erasure's event where files may hold remains of it, else None."""
    erased = latest(connection)
    return erased if erased > latest(connection, SCRUBBED) else None


def latest(connection: Connection, kind: str = ERASED) -> int:
    """Return the latest event of an erasure, or of a scrubbing; 0 when there was none."""
    return connection.scalar(select(func.max(events.c.id)).where(events.c.kind == kind)) or 0


def scrubbed(connection: Connection, policy: str, up_to: int, *, at: float) -> None:
    """Log that nothing is left of what was erased, unless more was erased after that event."""
    if unscrubbed(connection) == up_to:
        _log(connection, policy, SCRUBBED, at, "server", {"reason": ""})
