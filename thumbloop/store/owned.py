"""Whose a reply is, and whether it may be rated still; whose a request id is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError

from thumbloop.errors import FeedbackTooLate, RequestIdTaken
from thumbloop.store.schema import interactions
from thumbloop.types import User


class Given(NamedTuple):
    """By which version a reply was given, and when, unix seconds; and whether with all its candidates."""

    policy_version: int
    at: float
    shows_candidates: bool


def given(connection: Connection, response_id: str, user: User) -> Given | None:
    """Return who had answered a user, and when; None: no such reply, or it was another user's.

    Nobody else says anything of that reply until the transaction ends.
    """
    row = connection.execute(
        select(
            interactions.c.policy_version,
            interactions.c.created_at,
            interactions.c.shows_candidates,
        )
        .where(
            interactions.c.response_id == response_id,
            interactions.c.subject == user.subject,
            interactions.c.user_id == user.user_id,
        )
        .with_for_update()  # of PostgreSQL, which several servers may write to; SQLite has one writer anyway
    ).one_or_none()
    return None if row is None else Given(*row)


def refuse_late(reply: Given, window_s: float, now: float) -> None:
    """Raise FeedbackTooLate: the reply was given longer ago than it may be rated."""
    if now - reply.at > window_s:
        raise FeedbackTooLate(
            f"the reply is too old to be rated: it can be for {window_s:.0f} s (feedback.window_s);"
            " what was said of it before still counts"
        )


@contextmanager
def unless_taken(request_id: str) -> Iterator[None]:
    """Raise RequestIdTaken where the rows cannot be written as another server has just used that id."""
    try:
        yield
    except IntegrityError:
        if not request_id:
            raise
        raise RequestIdTaken(
            "request_id: another server has answered a request of this id; send it again"
        ) from None
