"""Requests as they were answered, with all their candidates. Written by the server only."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import (
    Connection,
    RowMapping,
    bindparam,
    func,
    insert,
    select,
)

from thumbloop.store.learned import Rounds, is_among
from thumbloop.store.owned import unless_taken
from thumbloop.store.packing import pack_floats, pack_ids, unpack_floats, unpack_ids
from thumbloop.store.schema import (
    candidates,
    interactions,
    round_inputs,
    thumbs,
)
from thumbloop.types import (
    Arm,
    Candidate,
    Extent,
    FinishReason,
    Interaction,
    Learning,
    Message,
    Prompt,
    Role,
    Sampling,
    Status,
    User,
)

# Columns that hold an attribute as it is.
_SAME_OF_INTERACTION = (
    "response_id",
    "policy",
    "policy_version",
    "session_id",
    "request_id",
    "request_digest",
    "reranked",
    "trainable",
    "untrainable_reason",
    "policy_digest",
    "reward_digest",
    "created_at",
    "duration_s",
    "pinned",
    "shows_candidates",
)
_SAME_OF_CANDIDATE = ("policy_version", "reward", "propensity", "chosen", "stage_rewards")
_OF_REQUEST = select(interactions.c.response_id, interactions.c.request_digest).where(
    interactions.c.subject == bindparam("subject"),
    interactions.c.user_id == bindparam("user_id"),
    interactions.c.request_id == bindparam("request_id"),
    interactions.c.request_digest != "",
)
T = TypeVar("T")

BATCH = 200
"""Rows that are read at a time: no query reads for long."""


def append(connection: Connection, interaction: Interaction) -> None:
    """Write a request and its candidates.

    Raises RequestIdTaken: another server has answered a request of this id in the meantime.
    """
    with unless_taken(interaction.request_digest):
        connection.execute(insert(interactions), _interaction_row(interaction))
    rows = [_candidate_row(interaction.response_id, c) for c in interaction.candidates]
    if rows:
        connection.execute(insert(candidates), rows)


def get(connection: Connection, response_id: str) -> Interaction | None:
    """Return one interaction, None when there is none."""
    return next(iter(load(connection, [response_id])), None)


def find(connection: Connection, user: User, request_id: str) -> Interaction | None:
    """Return the interaction that answered a user's request of this id, None when there is none."""
    found = find_id(connection, user, request_id)
    return None if found is None else get(connection, found.response_id)


class Answered(NamedTuple):
    """Which interaction answered a request, and the digest of that."""

    response_id: str
    request_digest: str


def find_id(connection: Connection, user: User, request_id: str) -> Answered | None:
    """Return what tells the interaction that answered a user's request of this id, None when there is none."""
    ids = {"subject": user.subject, "user_id": user.user_id, "request_id": request_id}
    row = connection.execute(_OF_REQUEST, ids).one_or_none()
    return None if row is None else Answered(*row)


def is_there(connection: Connection, response_id: str) -> bool:
    """Say whether there is such an interaction, whoever's it is."""
    query = select(interactions.c.response_id).where(interactions.c.response_id == response_id)
    return connection.scalar(query) is not None


def list_since(connection: Connection, policy: str, min_version: int) -> list[Interaction]:
    """Return the interactions answered by `min_version` or a later version, oldest first."""
    return list(newest_since(connection, policy, min_version))[::-1]


def newest_since(connection: Connection, policy: str, min_version: int) -> Iterator[Interaction]:
    """Yield the same, newest first; they are read in batches, as far as somebody asks for them."""
    query = (
        select(interactions.c.response_id)
        .where(interactions.c.policy == policy, interactions.c.policy_version >= min_version)
        .order_by(interactions.c.response_id.desc())
        .execution_options(yield_per=BATCH)
    )
    with connection.scalars(query) as ids:
        for batch in ids.partitions():
            yield from reversed(load(connection, batch))


def count(connection: Connection, policy: str) -> int:
    """Return how many interactions there are."""
    query = select(func.count()).select_from(interactions).where(interactions.c.policy == policy)
    return int(connection.scalar(query) or 0)


def count_by_user(connection: Connection, policy: str, min_version: int) -> dict[User, int]:
    """Return how many replies each user has of `min_version` or a later version."""
    query = (
        select(interactions.c.subject, interactions.c.user_id, func.count())
        .where(interactions.c.policy == policy, interactions.c.policy_version >= min_version)
        .group_by(interactions.c.subject, interactions.c.user_id)
    )
    return {User(subject, user_id): n for subject, user_id, n in connection.execute(query)}


def count_unrated(connection: Connection, policy: str) -> list[tuple[Learning, Status, int]]:
    """Return how many interactions nobody gave a thumb, by whether they may be learned from."""
    query = (
        select(interactions.c.learning, interactions.c.status, func.count())
        .outerjoin(thumbs, thumbs.c.response_id == interactions.c.response_id)
        .where(interactions.c.policy == policy, thumbs.c.response_id.is_(None))
        .group_by(interactions.c.learning, interactions.c.status)
    )
    return [
        (Learning(learning), Status(status), number)
        for learning, status, number in connection.execute(query)
    ]


def count_candidates(connection: Connection, policy: str, *, before: int | None = None) -> int:
    """Return how many candidates there are, or only those of requests that earlier versions answered."""
    query = (
        select(func.count())
        .select_from(candidates)
        .join(interactions, interactions.c.response_id == candidates.c.response_id)
        .where(interactions.c.policy == policy)
    )
    if before is not None:
        query = query.where(interactions.c.policy_version < before)
    return int(connection.scalar(query) or 0)


def used_as_rollouts(
    connection: Connection, round_ids: Rounds, min_version: int
) -> list[Interaction]:
    """Return those by `min_version` or a later version whose candidates these rounds trained the policy on."""
    query = (
        select(interactions.c.response_id)
        .join(round_inputs, round_inputs.c.row == interactions.c.response_id)
        .where(
            round_inputs.c.role == "rollout",
            is_among(round_ids),
            interactions.c.policy_version >= min_version,
        )
        .order_by(interactions.c.response_id)
    )
    return load(connection, connection.scalars(query))


def load(connection: Connection, response_ids: Iterable[str]) -> list[Interaction]:
    """Return these interactions, oldest first within each batch."""
    loaded: list[Interaction] = []
    for batch in batches(response_ids):
        by_response: dict[str, list[Candidate]] = defaultdict(list)
        for row in connection.execute(
            select(candidates)
            .where(candidates.c.response_id.in_(batch))
            .order_by(candidates.c.response_id, candidates.c.position)
        ).mappings():
            by_response[row["response_id"]].append(candidate_of(row))
        rows = connection.execute(
            select(interactions)
            .where(interactions.c.response_id.in_(batch))
            .order_by(interactions.c.response_id)
        ).mappings()
        loaded += [_interaction_of(row, by_response[row["response_id"]]) for row in rows]
    return loaded


def batches(ids: Iterable[T]) -> Iterator[list[T]]:
    """Yield ids, so many at a time as are read at once."""
    listed = list(ids)
    for start in range(0, len(listed), BATCH):
        yield listed[start : start + BATCH]


def _interaction_row(interaction: Interaction) -> dict[str, Any]:
    return {name: getattr(interaction, name) for name in _SAME_OF_INTERACTION} | {
        "subject": interaction.user.subject,
        "user_id": interaction.user.user_id,
        "prompt": _prompt_json(interaction.prompt),
        "prompt_token_ids": pack_ids(interaction.prompt_token_ids),
        "sampling": asdict(interaction.sampling),
        "strategy": str(interaction.strategy),
        "extent": interaction.extent.value,
        "arm": interaction.arm.value,
        "learning": interaction.learning.value,
        "status": interaction.status.value,
    }


def _candidate_row(response_id: str, candidate: Candidate) -> dict[str, Any]:
    return {name: getattr(candidate, name) for name in _SAME_OF_CANDIDATE} | {
        "response_id": response_id,
        "position": candidate.index,
        "text": candidate.text.replace("\0", "\N{REPLACEMENT CHARACTER}"),  # PostgreSQL takes none
        "token_ids": pack_ids(candidate.token_ids),
        "logprobs": pack_floats(candidate.logprobs),
        "finish_reason": candidate.finish_reason.value,
        "reward_components": dict(candidate.reward_components),
    }


def candidate_of(row: RowMapping) -> Candidate:
    """Return the candidate in a row of `candidates`."""
    return Candidate(
        index=row["position"],
        policy_version=row["policy_version"],
        token_ids=unpack_ids(row["token_ids"]),
        logprobs=unpack_floats(row["logprobs"]),
        text=row["text"],
        finish_reason=FinishReason(row["finish_reason"]),
        reward=row["reward"],
        propensity=row["propensity"],
        chosen=row["chosen"],
        stage_rewards=tuple(row["stage_rewards"]),
        reward_components=row["reward_components"],
    )


def sampling_of(stored: Mapping[str, Any]) -> Sampling:
    """Return the settings in a column `sampling`."""
    return Sampling(**{**stored, "stop": tuple(stored["stop"])})


def _interaction_of(row: RowMapping, of_it: list[Candidate]) -> Interaction:
    return Interaction(
        response_id=row["response_id"],
        policy=row["policy"],
        policy_version=row["policy_version"],
        user=User(row["subject"], row["user_id"]),
        session_id=row["session_id"],
        request_id=row["request_id"],
        request_digest=row["request_digest"],
        prompt=prompt_of(row["prompt"]),
        prompt_token_ids=unpack_ids(row["prompt_token_ids"]),
        sampling=sampling_of(row["sampling"]),
        strategy=row["strategy"],
        arm=Arm(row["arm"]),
        reranked=row["reranked"],
        extent=Extent(row["extent"]),
        learning=Learning(row["learning"]),
        status=Status(row["status"]),
        trainable=row["trainable"],
        untrainable_reason=row["untrainable_reason"],
        policy_digest=row["policy_digest"],
        reward_digest=row["reward_digest"],
        created_at=row["created_at"],
        duration_s=row["duration_s"],
        pinned=row["pinned"],
        shows_candidates=row["shows_candidates"],
        candidates=tuple(of_it),
    )


def _prompt_json(prompt: Prompt) -> dict[str, Any]:
    if prompt.text is not None:
        return {"text": prompt.text}
    return {"messages": [[m.role.value, m.content] for m in prompt.messages]}


def prompt_of(stored: Mapping[str, Any]) -> Prompt:
    """Return the prompt in a column `prompt`."""
    if "text" in stored:
        return Prompt(text=stored["text"])
    return Prompt(messages=tuple(Message(Role(r), content) for r, content in stored["messages"]))
