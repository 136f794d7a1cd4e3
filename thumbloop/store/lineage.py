"""Where versions come from: what the rounds behind them used, and whose it was."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, String, cast, func, select

from thumbloop.store import versions
from thumbloop.store.schema import (
    feedback,
    interactions,
    policy_versions,
    preferences,
    round_inputs,
)
from thumbloop.types import User

_NEW = ("new", "preference")
_REPLAYED = ("replay", "old_preference")
_ROLLOUT = ("rollout",)


class Inputs(NamedTuple):
    """How much a round used: thumbs and preferences, new and replayed, and replies as rollouts."""

    new: int = 0
    replayed: int = 0
    replies: int = 0


class Influence(NamedTuple):
    """How much of one user's a round used, new or replayed."""

    thumbs: int = 0
    preferences: int = 0
    replies: int = 0


def inputs_behind(connection: Connection, policy: str, version: int) -> dict[str, Inputs]:
    """Return what each of the rounds behind a version used, by round; what was erased since included."""
    query = (
        select(round_inputs.c.round_id, round_inputs.c.role, func.count())
        .where(round_inputs.c.round_id.in_(versions.rounds_behind(policy, version)))
        .group_by(round_inputs.c.round_id, round_inputs.c.role)
    )
    used: dict[str, dict[str, int]] = defaultdict(dict)
    for round_id, role, number in connection.execute(query):
        used[round_id][role] = number
    return {
        round_id: Inputs(*(_sum(roles, these) for these in (_NEW, _REPLAYED, _ROLLOUT)))
        for round_id, roles in used.items()
    }


def _sum(numbers: Mapping[str, int], roles: tuple[str, ...]) -> int:
    return sum(numbers.get(role, 0) for role in roles)


def learned_from(connection: Connection, policy: str, user: User) -> dict[int, Influence]:
    """Return the versions whose own rounds used a user's feedback or replies, and how much, oldest first."""
    kinds = (
        (select(cast(feedback.c.id, String)), feedback, ("new", "replay")),
        (select(cast(preferences.c.id, String)), preferences, ("preference", "old_preference")),
        (select(interactions.c.response_id), interactions, _ROLLOUT),
    )
    found = [
        {row.version: row.number for row in connection.execute(_used(policy, ids, roles))}
        for ids, roles in (
            (query.where(table.c.subject == user.subject, table.c.user_id == user.user_id), roles)
            for query, table, roles in kinds
        )
    ]
    numbers = sorted({version for each in found for version in each})
    return {n: Influence(*(each.get(n, 0) for each in found)) for n in numbers}


def _used(policy: str, ids: Select[Any], roles: tuple[str, ...]) -> Select[Any]:
    """Count, by version, which of these rows its round used in one of these roles."""
    return (
        select(policy_versions.c.version, func.count().label("number"))
        .join(round_inputs, round_inputs.c.round_id == policy_versions.c.round_id)
        .where(
            policy_versions.c.policy == policy,
            round_inputs.c.role.in_(roles),
            round_inputs.c.row.in_(ids),
        )
        .group_by(policy_versions.c.version)
    )
