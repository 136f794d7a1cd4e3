"""Feedback from before: what people said of replies that no version of ours gave."""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import Connection, insert

from thumbloop.store import feedback, interactions, preferences
from thumbloop.store.schema import events
from thumbloop.types import IMPORTED, Interaction

BETTER, WORSE = 0, 1
"""Places of the two candidates of a reply that was imported with a preference."""


class Import(NamedTuple):
    """A reply, and what was said of it: `value` 1 is a thumb up, 0 one down, None that its first candidate was better
    than its second. `source_id` is what it was called where it comes from; empty: nothing."""

    reply: Interaction
    value: int | None
    comment: str = ""
    source_id: str = ""


class Outcome(StrEnum):
    """What became of something that was brought in."""

    IMPORTED = "imported"
    DUPLICATE = "duplicate"
    """It is there already."""
    REFUSED = "refused"
    """Of this name something else is there already."""


class Brought(NamedTuple):
    """What became of it, and what the reply is called; empty where it was refused."""

    outcome: Outcome
    response_id: str = ""


def bring_in(
    connection: Connection, policy: str, items: Sequence[Import], *, at: float, actor: str
) -> list[Brought]:
    """Write imported replies with what was said of them, each once; log how many there were, and who did it.

    A reply is known by its user, `request_id` and `request_digest`, or where it was exported from this store by
    what it was called there. Raises RequestIdTaken: another server brings in the same; nothing is written then.
    """
    done = [_bring_in(connection, item) for item in items]
    new = [item for item, each in zip(items, done, strict=True) if each.outcome is Outcome.IMPORTED]
    if new:
        thumbs = sum(item.value is not None for item in new)
        detail = {"reason": "", "thumbs": thumbs, "preferences": len(new) - thumbs}
        connection.execute(
            insert(events).values(at=at, kind=IMPORTED, policy=policy, actor=actor, detail=detail)
        )
    return done


def _bring_in(connection: Connection, item: Import) -> Brought:
    reply = item.reply
    earlier = interactions.find_id(connection, reply.user, reply.request_id)
    if earlier is not None:
        is_same = earlier.request_digest == reply.request_digest
        return (
            Brought(Outcome.DUPLICATE, earlier.response_id) if is_same else Brought(Outcome.REFUSED)
        )
    if item.source_id and interactions.is_there(connection, item.source_id):
        return Brought(Outcome.DUPLICATE, item.source_id)
    interactions.append(connection, reply)
    if item.value is None:
        preferences.submit_preference(
            connection, reply.response_id, BETTER, WORSE, reply.user, at=reply.created_at
        )
    else:
        feedback.submit_thumb(
            connection,
            reply.response_id,
            item.value,
            reply.user,
            comment=item.comment,
            at=reply.created_at,
        )
    return Brought(Outcome.IMPORTED, reply.response_id)
