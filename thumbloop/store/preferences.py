"""Preferences: one candidate of a reply was better than another. Append-only; the last word counts."""

import math
from typing import Any

from sqlalchemy import (
    Connection,
    RowMapping,
    Select,
    case,
    func,
    insert,
    select,
)

from thumbloop.errors import InvalidRequest, RequestIdTaken, UnknownResponse
from thumbloop.store.interactions import BATCH, load
from thumbloop.store.learned import NewFeedback, Rounds, keep_newest, learned_preferences
from thumbloop.store.owned import given, refuse_late, unless_taken
from thumbloop.store.schema import candidates, interactions, preferences
from thumbloop.types import ComparedReply, FinishReason, Interaction, Preference, User

_UNKNOWN = (
    "there is no such response; compare candidates of one that Generate returned to this user"
)
_UNSEEN = "names a reply whose candidates were not shown; ask for them with include_candidates"


def submit_preference(
    connection: Connection,
    response_id: str,
    better: int,
    worse: int,
    user: User,
    *,
    request_id: str = "",
    at: float,
    window_s: float = math.inf,
) -> Preference:
    """Store that candidate `better` beat candidate `worse`; a repeated request changes nothing.

    Raises UnknownResponse: no such reply, or it was given to another user. InvalidRequest: its
    candidates were not shown, there is no such candidate, or it was aborted. RequestIdTaken: by another preference. FeedbackTooLate: the reply was
    given more than `window_s` before, and this is no repeat.
    """
    reply = given(connection, response_id, user)
    if reply is None:
        raise UnknownResponse(_UNKNOWN)
    if not reply.shows_candidates:
        raise InvalidRequest.of("response_id", _UNSEEN)
    version = reply.policy_version
    _check_candidates(connection, response_id, better, worse)
    said = (response_id, better, worse)
    earlier = (
        _same_request(connection, user, request_id, said)
        if request_id
        else _last_word(connection, *said)
    )
    if earlier is not None and (earlier["better"], earlier["worse"]) == (better, worse):
        number, at = earlier["id"], earlier["created_at"]
        return Preference(number, response_id, version, better, worse, user, at, duplicate=True)
    refuse_late(reply, window_s, at)
    with unless_taken(request_id):
        number = connection.execute(
            insert(preferences)
            .values(
                response_id=response_id,
                better=better,
                worse=worse,
                subject=user.subject,
                user_id=user.user_id,
                request_id=request_id or None,
                created_at=at,
            )
            .returning(preferences.c.id)
        ).scalar_one()
    return Preference(number, response_id, version, better, worse, user, at)


def _check_candidates(connection: Connection, response_id: str, better: int, worse: int) -> None:
    """Make sure that both were there to be read, to their end."""
    query = select(candidates.c.position, candidates.c.finish_reason)
    found = connection.execute(query.where(candidates.c.response_id == response_id))
    reasons = {row.position: row.finish_reason for row in found}
    for field, index in (("better_index", better), ("worse_index", worse)):
        if index not in reasons:
            raise InvalidRequest.of(field, f"has to be in [0, {len(reasons) - 1}] for this reply")
        if reasons[index] == FinishReason.ABORTED.value:
            raise InvalidRequest.of(field, "names a candidate that was aborted on its way")


def _same_request(
    connection: Connection, user: User, request_id: str, said: tuple[str, int, int]
) -> RowMapping | None:
    """Return what a user's request stored, if it came before."""
    query = select(preferences).where(
        preferences.c.subject == user.subject,
        preferences.c.user_id == user.user_id,
        preferences.c.request_id == request_id,
    )
    same = connection.execute(query).mappings().one_or_none()
    if same is not None and (same["response_id"], same["better"], same["worse"]) != said:
        raise RequestIdTaken(
            "request_id: was used for another preference; a new preference needs a new one"
        )
    return same


def _last_word(
    connection: Connection, response_id: str, better: int, worse: int
) -> RowMapping | None:
    """Return what was said last of two candidates."""
    query = (
        select(preferences)
        .where(
            preferences.c.response_id == response_id,
            preferences.c.better.in_((better, worse)),
            preferences.c.worse.in_((better, worse)),
        )
        .order_by(preferences.c.id.desc())
        .limit(1)
    )
    return connection.execute(query).mappings().one_or_none()


def _effective(policy: str) -> Select[Any]:
    """Select the ids of the last words on every two candidates of the policy's replies."""
    is_ordered = preferences.c.better < preferences.c.worse
    low = case((is_ordered, preferences.c.better), else_=preferences.c.worse)
    high = case((is_ordered, preferences.c.worse), else_=preferences.c.better)
    return (
        select(func.max(preferences.c.id))
        .join(interactions, interactions.c.response_id == preferences.c.response_id)
        .where(interactions.c.policy == policy)
        .group_by(preferences.c.response_id, low, high)
    )


def list_compared(
    connection: Connection, policy: str, learned_by: Rounds = (), max_older: float = math.inf
) -> list[ComparedReply]:
    """Return every effective preference with the two candidates it is about, oldest first.

    `learned_by` names the rounds whose preferences are no longer new; of such the newest `max_older` are
    read, and the rest is passed over.
    """
    learned = learned_preferences(connection, learned_by)
    query = (
        select(preferences)
        .where(preferences.c.id.in_(_effective(policy)))
        .order_by(preferences.c.id.desc())
        .execution_options(yield_per=BATCH)
    )
    newest_first = connection.execute(query).mappings()
    kept = list(keep_newest(newest_first, lambda row: _said(row) not in learned, max_older))
    replies = {
        reply.response_id: reply
        for reply in load(connection, sorted({row["response_id"] for row, _ in kept}))
    }
    return [_compared(row, is_new, replies[row["response_id"]]) for row, is_new in reversed(kept)]


def _compared(row: RowMapping, is_new: bool, reply: Interaction) -> ComparedReply:
    by_position = {candidate.index: candidate for candidate in reply.candidates}
    return ComparedReply(
        preference_id=row["id"],
        response_id=row["response_id"],
        created_at=row["created_at"],
        is_new=is_new,
        user=User(row["subject"], row["user_id"]),
        policy_version=reply.policy_version,
        learning=reply.learning,
        status=reply.status,
        prompt_token_ids=reply.prompt_token_ids,
        better=by_position[row["better"]],
        worse=by_position[row["worse"]],
    )


def count(connection: Connection, policy: str) -> int:
    """Return how many effective preferences there are."""
    query = select(func.count()).select_from(_effective(policy).subquery())
    return int(connection.scalar(query) or 0)


def count_new(
    connection: Connection,
    policy: str,
    learned_by: Rounds,
    oldest: float = -math.inf,
    max_older: float = math.inf,
) -> NewFeedback:
    """Return how many effective preferences are new; those from before `oldest`, in unix seconds, teach nothing.

    Of those that are not new the newest `max_older` are counted by user.
    """
    query = (
        select(
            preferences.c.response_id,
            preferences.c.better,
            preferences.c.worse,
            preferences.c.created_at,
            interactions.c.subject,
            interactions.c.user_id,
            interactions.c.learning,
            interactions.c.status,
        )
        .join(interactions, interactions.c.response_id == preferences.c.response_id)
        .where(preferences.c.id.in_(_effective(policy)))
        .order_by(preferences.c.id.desc())
        .execution_options(yield_per=BATCH)
    )
    learned = learned_preferences(connection, learned_by)
    newest_first = connection.execute(query).mappings()
    kept = keep_newest(newest_first, lambda row: _said(row) not in learned, max_older)
    return NewFeedback.of(kept, oldest)


def _said(row: RowMapping) -> tuple[str, int, int]:
    return row["response_id"], row["better"], row["worse"]
