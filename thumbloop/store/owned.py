"""Whose a reply is, and whether it may be rated still."""

from typing import NamedTuple

from sqlalchemy import Connection, select

from thumbloop.errors import FeedbackTooLate
from thumbloop.store.schema import interactions
from thumbloop.types import User


class Given(NamedTuple):
    """By which version a reply was given, and when, unix seconds; and whether with all its candidates."""

    policy_version: int
    at: float
    shows_candidates: bool


def given(connection: Connection, response_id: str, user: User) -> Given | None:
    """Return who had answered a user, and when; None: no such reply, or it was another user's."""
    row = connection.execute(
        select(
            interactions.c.policy_version,
            interactions.c.created_at,
            interactions.c.shows_candidates,
        ).where(
            interactions.c.response_id == response_id,
            interactions.c.subject == user.subject,
            interactions.c.user_id == user.user_id,
        )
    ).one_or_none()
    return None if row is None else Given(*row)


def refuse_late(reply: Given, window_s: float, now: float) -> None:
    """Raise FeedbackTooLate: the reply was given longer ago than it may be rated."""
    if now - reply.at > window_s:
        raise FeedbackTooLate(
            f"the reply is too old to be rated: it can be for {window_s:.0f} s (feedback.window_s);"
            " what was said of it before still counts"
        )
