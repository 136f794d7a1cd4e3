"""What users said and got in a trial: of each, the first that counts, on either version's side."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, and_, case, func, select

from thumbloop.store.packing import unpack_ids
from thumbloop.store.schema import candidates, feedback, interactions
from thumbloop.types import Status, User, promise_of

CORRUPTED = "corrupted"
"""Why a reply failed whose log-probabilities were no numbers."""
_BYTES_OF_ID = 4
_RECENT = 500


class TrialThumb(NamedTuple):
    """A user's first thumb for a version's replies; `promise` is the logit of a thumb up that the reward model gave
    the reply, None where it gave none."""

    user: User
    session_id: str
    version: int
    value: int
    promise: float | None


class TrialReply(NamedTuple):
    """A user's first reply from a version; `token_ids` and `text` of what was shown, if anything was."""

    response_id: str
    user: User
    session_id: str
    version: int
    status: Status
    duration_s: float | None
    token_ids: tuple[int, ...]
    text: str


_OWNER = (
    interactions.c.subject,
    interactions.c.user_id,
    # The session stands for a person where there is no name.
    case(
        (
            and_(interactions.c.subject == "", interactions.c.user_id == ""),
            interactions.c.session_id,
        ),
        else_="",
    ),
    interactions.c.policy_version,
)
_SHOWN = and_(candidates.c.response_id == interactions.c.response_id, candidates.c.chosen)


def first_thumbs(
    connection: Connection, policy: str, versions: Sequence[int], since: float
) -> list[TrialThumb]:
    """Return each user's first thumb for the replies that each version gave since then, in order.

    What was said first stays first: a change of mind is no other vote.
    """
    first = (
        _in_trial(select(func.min(feedback.c.id)), policy, versions, since)
        .join(feedback, feedback.c.response_id == interactions.c.response_id)
        .join(candidates, _SHOWN)  # of what came to nothing nobody says anything
        .group_by(*_OWNER)
    )
    query = (
        select(
            interactions.c.subject,
            interactions.c.user_id,
            interactions.c.session_id,
            interactions.c.policy_version,
            feedback.c.value,
            candidates.c.reward,
            candidates.c.reward_components,
        )
        .join(interactions, interactions.c.response_id == feedback.c.response_id)
        .join(candidates, _SHOWN)
        .where(feedback.c.id.in_(first))
        .order_by(feedback.c.id)
    )
    return [
        TrialThumb(
            User(subject, user_id), session_id, version, value, promise_of(reward, components)
        )
        for subject, user_id, session_id, version, value, reward, components in connection.execute(
            query
        )
    ]


def first_replies(
    connection: Connection, policy: str, versions: Sequence[int], since: float
) -> list[TrialReply]:
    """Return each user's request that was over first of those that each version took up since then, in order,
    however it ended.

    What was over first stays first: a reply that takes long takes no other's place.
    """
    rank = func.row_number().over(
        partition_by=_OWNER, order_by=(interactions.c.created_at, interactions.c.response_id)
    )
    ranked = _in_trial(
        select(interactions.c.response_id, rank.label("rank")), policy, versions, since
    ).subquery()
    first = select(ranked.c.response_id).where(ranked.c.rank == 1)
    query = (
        select(
            interactions.c.response_id,
            interactions.c.subject,
            interactions.c.user_id,
            interactions.c.session_id,
            interactions.c.policy_version,
            interactions.c.status,
            interactions.c.duration_s,
            candidates.c.token_ids,
            candidates.c.text,
        )
        .outerjoin(candidates, _SHOWN)
        .where(interactions.c.response_id.in_(first))
        .order_by(interactions.c.created_at, interactions.c.response_id)
    )
    return [
        TrialReply(
            response_id,
            User(subject, user_id),
            session_id,
            version,
            Status(status),
            duration_s,
            unpack_ids(token_ids) if token_ids else (),
            text or "",
        )
        for (
            response_id,
            subject,
            user_id,
            session_id,
            version,
            status,
            duration_s,
            token_ids,
            text,
        ) in connection.execute(query)
    ]


def count_corrupted(connection: Connection, policy: str, version: int, since: float) -> int:
    """Return how many of a version's replies since then had numbers that are none."""
    query = _in_trial(select(func.count()), policy, [version], since)
    return int(connection.scalar(query.where(interactions.c.untrainable_reason == CORRUPTED)) or 0)


class Typical(NamedTuple):
    """Medians of a version's latest replies: seconds in the engine, and tokens shown; None: there are none."""

    seconds: float | None
    tokens: float | None


def typical(connection: Connection, policy: str, version: int) -> Typical:
    """Return what a version's replies are like."""
    query = (
        _in_trial(
            select(interactions.c.duration_s, func.length(candidates.c.token_ids)),
            policy,
            [version],
            since=0.0,
        )
        .join(candidates, _SHOWN)
        .where(interactions.c.duration_s.is_not(None))
        .order_by(interactions.c.created_at.desc())
        .limit(_RECENT)
    )
    found = connection.execute(query).all()
    if not found:
        return Typical(None, None)
    return Typical(median(r[0] for r in found), median(r[1] for r in found) / _BYTES_OF_ID)


def _in_trial(
    query: Select[Any], policy: str, versions: Sequence[int], since: float
) -> Select[Any]:
    """Restrict a query to the requests that these versions were given by their routing since then."""
    return query.select_from(interactions).where(
        interactions.c.policy == policy,
        interactions.c.policy_version.in_(versions),
        interactions.c.created_at >= since,  # fast, by the index; and begun since then, too
        interactions.c.created_at - func.coalesce(interactions.c.duration_s, 0.0) >= since,
        interactions.c.pinned.is_(False),
    )
