"""Thumbs: an append-only history of events, and the effective thumb of each reply."""

import math
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, delete, func, insert, select

from thumbloop.errors import RequestIdTaken, UnknownResponse
from thumbloop.store.interactions import BATCH, batches, candidate_of, sampling_of
from thumbloop.store.learned import NewFeedback, Rounds, keep_newest, learned_thumbs
from thumbloop.store.owned import given, refuse_late, unless_taken
from thumbloop.store.packing import unpack_ids
from thumbloop.store.schema import candidates, feedback, interactions, round_inputs, thumbs
from thumbloop.types import Arm, Feedback, Learning, RatedReply, Status, User

THUMB = "thumb"
_UNKNOWN = "there is no such response; rate a response_id that Generate returned to this user"


def submit_thumb(
    connection: Connection,
    response_id: str,
    value: int,
    user: User,
    *,
    comment: str = "",
    request_id: str = "",
    at: float,
    window_s: float = math.inf,
) -> Feedback:
    """Store a thumb (1 up, 0 down); a repeated request changes nothing.

    The effective thumb is the last one's value, and the first event of it: saying the same again,
    with a comment for instance, is remembered but gives nothing new to learn from.

    Raises UnknownResponse: no such reply, or it was given to another user. RequestIdTaken: by other
    feedback. FeedbackTooLate: the reply was given more than `window_s` before, and this is no repeat.
    """
    reply = given(connection, response_id, user)
    if reply is None:
        raise UnknownResponse(_UNKNOWN)
    version = reply.policy_version
    effective = _effective(connection, response_id)
    if request_id:
        earlier = _same_request(connection, response_id, user, request_id, value, comment)
    else:
        says_the_same = effective and (effective["value"], effective["comment"]) == (value, comment)
        earlier = effective if says_the_same else None
    if earlier is not None:
        return Feedback(
            earlier["id"],
            response_id,
            version,
            earlier["value"],
            user,
            earlier["created_at"],
            duplicate=True,
        )
    refuse_late(reply, window_s, at)
    with unless_taken(request_id):
        feedback_id = connection.execute(
            insert(feedback)
            .values(
                response_id=response_id,
                kind=THUMB,
                value=value,
                comment=comment,
                subject=user.subject,
                user_id=user.user_id,
                request_id=request_id or None,
                created_at=at,
            )
            .returning(feedback.c.id)
        ).scalar_one()
    if effective is None or effective["value"] != value:
        connection.execute(delete(thumbs).where(thumbs.c.response_id == response_id))
        connection.execute(insert(thumbs).values(response_id=response_id, feedback_id=feedback_id))
    return Feedback(feedback_id, response_id, version, value, user, at)


_EVENT = (
    feedback.c.id,
    feedback.c.response_id,
    feedback.c.value,
    feedback.c.comment,
    feedback.c.created_at,
)


def _effective(connection: Connection, response_id: str) -> RowMapping | None:
    """Return the event of the thumb that counts."""
    query = select(*_EVENT).join(thumbs, thumbs.c.feedback_id == feedback.c.id)
    found = connection.execute(query.where(thumbs.c.response_id == response_id))
    return found.mappings().one_or_none()


def _same_request(
    connection: Connection, response_id: str, user: User, request_id: str, value: int, comment: str
) -> RowMapping | None:
    """Return the event that a user's request stored, if it came before."""
    query = select(*_EVENT).where(
        feedback.c.subject == user.subject,
        feedback.c.user_id == user.user_id,
        feedback.c.request_id == request_id,
    )
    same = connection.execute(query).mappings().one_or_none()
    if same is not None and (same["response_id"], same["value"], same["comment"]) != (
        response_id,
        value,
        comment,
    ):
        raise RequestIdTaken("request_id: was used for other feedback; a new thumb needs a new one")
    return same


def list_rated(
    connection: Connection, policy: str, learned_by: Rounds = (), max_older: float = math.inf
) -> list[RatedReply]:
    """Return every effective thumb with the reply it judges, oldest first.

    `learned_by` names the rounds whose feedback is no longer new; of such thumbs the newest `max_older`
    are read, and the rest is passed over.
    """
    learned = learned_thumbs(connection, learned_by)
    newest_first = connection.execute(
        _rated(policy, feedback.c.id, feedback.c.response_id, feedback.c.value)
        .order_by(feedback.c.id.desc())
        .execution_options(yield_per=BATCH)
    ).mappings()
    kept = keep_newest(newest_first, lambda row: _said(row) not in learned, max_older)
    are_new = {row["id"]: is_new for row, is_new in kept}
    query = _rated(
        policy,
        feedback.c.id.label("feedback_id"),
        feedback.c.value,
        feedback.c.created_at.label("rated_at"),
        interactions.c.subject,
        interactions.c.user_id,
        interactions.c.learning,
        interactions.c.status,
        interactions.c.arm,
        interactions.c.prompt_token_ids,
        interactions.c.sampling,
        candidates,
    ).order_by(feedback.c.id)
    return [
        RatedReply(
            feedback_id=row["feedback_id"],
            response_id=row["response_id"],
            value=row["value"],
            created_at=row["rated_at"],
            is_new=are_new[row["feedback_id"]],
            user=User(row["subject"], row["user_id"]),
            policy_version=row["policy_version"],
            learning=Learning(row["learning"]),
            status=Status(row["status"]),
            arm=Arm(row["arm"]),
            prompt_token_ids=unpack_ids(row["prompt_token_ids"]),
            sampling=sampling_of(row["sampling"]),
            candidate=candidate_of(row),
        )
        for batch in batches(sorted(are_new))
        for row in connection.execute(query.where(feedback.c.id.in_(batch))).mappings()
    ]


def _rated(policy: str, *columns: Any) -> Select[Any]:
    """Select of the effective thumbs on the policy's replies, and of what they judge."""
    return (
        select(*columns)
        .select_from(thumbs)
        .join(feedback, feedback.c.id == thumbs.c.feedback_id)
        .join(interactions, interactions.c.response_id == thumbs.c.response_id)
        .join(candidates, candidates.c.response_id == thumbs.c.response_id)
        .where(interactions.c.policy == policy, candidates.c.chosen)
    )


def count(connection: Connection, policy: str) -> int:
    """Return how many effective thumbs there are."""
    return int(connection.scalar(_rated(policy, func.count())) or 0)


def count_new(
    connection: Connection,
    policy: str,
    learned_by: Rounds,
    oldest: float = -math.inf,
    max_older: float = math.inf,
) -> NewFeedback:
    """Return how many effective thumbs are new; those from before `oldest`, in unix seconds, teach nothing.

    Of those that are not new the newest `max_older` are counted by user.
    """
    effective = connection.execute(
        select(
            feedback.c.response_id,
            feedback.c.value,
            feedback.c.created_at,
            interactions.c.subject,
            interactions.c.user_id,
            interactions.c.learning,
            interactions.c.status,
        )
        .join(thumbs, thumbs.c.feedback_id == feedback.c.id)
        .join(interactions, interactions.c.response_id == thumbs.c.response_id)
        .where(interactions.c.policy == policy)
        .order_by(feedback.c.id.desc())
        .execution_options(yield_per=BATCH)
    ).mappings()
    learned = learned_thumbs(connection, learned_by)
    kept = keep_newest(effective, lambda row: _said(row) not in learned, max_older)
    return NewFeedback.of(kept, oldest)


def given_at(connection: Connection, round_id: str) -> list[float]:
    """Return when the thumbs were given that a round learned as new and that are still there, unix seconds."""
    inputs = select(round_inputs.c.row).where(
        round_inputs.c.round_id == round_id, round_inputs.c.role == "new"
    )
    ids = [int(row) for row in connection.scalars(inputs)]
    return [
        at
        for batch in batches(ids)
        for at in connection.scalars(select(feedback.c.created_at).where(feedback.c.id.in_(batch)))
    ]


def last_given_at(connection: Connection) -> float:
    """Return when the last thumb was given, unix seconds; 0 where there is none."""
    newest = select(feedback.c.created_at).order_by(feedback.c.id.desc()).limit(1)
    return float(connection.scalar(newest) or 0.0)


def _said(row: RowMapping) -> tuple[str, int]:
    return row["response_id"], row["value"]


def counts(connection: Connection) -> tuple[int, int]:
    """Return how many feedback events and how many effective thumbs are stored."""
    events = connection.scalar(select(func.count()).select_from(feedback))
    effective = connection.scalar(select(func.count()).select_from(thumbs))
    return int(events or 0), int(effective or 0)
