"""Policy versions: what the trainer published, with the state that the server has put it in."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import CTE, Connection, RowMapping, Select, func, insert, select

from thumbloop.store.schema import (
    deployments,
    events,
    policy_versions,
    round_inputs,
    rounds,
)
from thumbloop.types import PolicyVersion, Round, VersionState

TAINTED = "tainted"
"""Kind of the event that a version's own round learned from data that was erased."""


def list_versions(
    connection: Connection, policy: str, *, has_metrics: bool = True
) -> list[PolicyVersion]:
    """Return all versions of a policy with their state, oldest first; without metrics where nobody asks for
    them, as they are most of what there is to read.
    """
    query = _versions_of(policy, has_metrics=has_metrics)
    rows = connection.execute(query).mappings().all()
    tainted = _tainted(connection, policy)
    for row in rows:  # a parent comes before its children
        if row["parent"] in tainted:
            tainted.add(row["version"])
    return [_version_of(row, is_tainted=row["version"] in tainted) for row in rows]


def get(connection: Connection, policy: str, version: int) -> PolicyVersion | None:
    """Return one version, None when there is none."""
    query = _versions_of(policy).where(policy_versions.c.version == version)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else _with_taint(connection, row)


def current(connection: Connection, policy: str) -> PolicyVersion:
    """Return the version that answers; there is always exactly one."""
    query = _versions_of(policy).where(deployments.c.state == VersionState.CURRENT.value)
    return _with_taint(connection, connection.execute(query).mappings().one())


def canary(connection: Connection, policy: str) -> PolicyVersion | None:
    """Return the version on trial; there is at most one."""
    query = _versions_of(policy).where(deployments.c.state == VersionState.CANARY.value)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else _with_taint(connection, row)


def _with_taint(connection: Connection, row: RowMapping) -> PolicyVersion:
    """Return the version in a row; it is tainted where one of its line is."""
    tainted = _tainted(connection, row["policy"])
    if tainted:  # lines are long
        line = _line(row["policy"], row["version"])
        tainted &= set(connection.scalars(select(line.c.version)))
    return _version_of(row, is_tainted=bool(tainted))


def _tainted(connection: Connection, policy: str) -> set[int]:
    """Return the versions whose own rounds learned from data that was erased."""
    query = select(events.c.version).where(events.c.policy == policy, events.c.kind == TAINTED)
    return {version for version in connection.scalars(query) if version is not None}


def _versions_of(policy: str, *, has_metrics: bool = True) -> Select[Any]:
    columns = [c for c in policy_versions.c if has_metrics or c is not policy_versions.c.metrics]
    return (
        select(
            *columns,
            deployments.c.state,
            deployments.c.since,
            deployments.c.reason,
            deployments.c.collected_at,
        )
        .outerjoin(
            deployments,
            (deployments.c.policy == policy_versions.c.policy)
            & (deployments.c.version == policy_versions.c.version),
        )
        .where(policy_versions.c.policy == policy)
        .order_by(policy_versions.c.version)
    )


class Mark(NamedTuple):
    """Differs from an earlier one when versions were published or changed their state since."""

    highest: int
    last_event: int


def mark(connection: Connection, policy: str) -> Mark:
    """Return where the history of a policy's versions stands, at the same cost however long it is."""
    last_event = connection.scalar(select(func.max(events.c.id)))
    return Mark(next_number(connection, policy) - 1, int(last_event or 0))


def learned_by(connection: Connection, policy: str, version: int) -> list[str]:
    """Return the rounds behind a version: its own and those of all its ancestors."""
    return list(connection.scalars(rounds_behind(policy, version)))


def rounds_behind(policy: str, version: int) -> Select[tuple[str]]:
    """Return the query for the same, to be a part of others: a line may be longer than a list that one may pass."""
    line = _line(policy, version)
    known = line.c.round_id.is_not(None)
    return select(line.c.round_id).where(known).order_by(line.c.version.desc())


def _line(policy: str, version: int) -> CTE:
    """Return the query for a version and all its ancestors."""
    columns = policy_versions.c.version, policy_versions.c.parent, policy_versions.c.round_id
    of_policy = policy_versions.c.policy == policy
    itself = select(*columns).where(of_policy, policy_versions.c.version == version)
    line = itself.cte("line", recursive=True)
    return line.union_all(
        select(*columns).where(of_policy, policy_versions.c.version == line.c.parent)
    )


def next_number(connection: Connection, policy: str) -> int:
    """Return the number after the highest one ever published."""
    highest = connection.scalar(
        select(func.max(policy_versions.c.version)).where(policy_versions.c.policy == policy)
    )
    return int(highest or 0) + 1


def finish_round(connection: Connection, done: Round, published: PolicyVersion | None) -> None:
    """Record what a round used, and the version it published, in one transaction."""
    connection.execute(
        insert(rounds).values(
            round_id=done.round_id,
            policy=done.policy,
            parent=done.parent,
            version=done.version,
            reason=done.reason,
            metrics=dict(done.metrics),
            started_at=done.started_at,
            finished_at=done.finished_at,
        )
    )
    inputs: list[tuple[str, Iterable[int | str]]] = [
        ("new", done.new_feedback),
        ("replay", done.replayed_feedback),
        ("preference", done.new_preferences),
        ("old_preference", done.replayed_preferences),
        ("rollout", done.rollouts),
    ]
    rows = [
        {"round_id": done.round_id, "role": role, "row": str(row)}
        for role, used in inputs
        for row in used
    ]
    if rows:
        connection.execute(insert(round_inputs), rows)
    if published is not None:
        connection.execute(insert(policy_versions), _version_row(published))


def list_rounds(connection: Connection, policy: str) -> list[RowMapping]:
    """Return the rows of all rounds, oldest first."""
    query = select(rounds).where(rounds.c.policy == policy).order_by(rounds.c.finished_at)
    return list(connection.execute(query).mappings())


def feedback_by_version(connection: Connection, policy: str) -> dict[int, set[int]]:
    """Return the ids of the feedback that each version learned from as new."""
    query = (
        select(policy_versions.c.version, round_inputs.c.row)
        .join(round_inputs, round_inputs.c.round_id == policy_versions.c.round_id)
        .where(policy_versions.c.policy == policy, round_inputs.c.role == "new")
    )
    learned: dict[int, set[int]] = defaultdict(set)
    for version, row in connection.execute(query):
        learned[version].add(int(row))
    return dict(learned)


_PUBLISHED = (
    "policy",
    "version",
    "parent",
    "folder",
    "policy_digest",
    "reward_digest",
    "manifest_digest",
    "round_id",
    "feedback_count",
    "first_feedback_id",
    "last_feedback_id",
    "metrics",
    "published_at",
)


def _version_row(version: PolicyVersion) -> dict[str, Any]:
    return {name: getattr(version, name) for name in _PUBLISHED}


def _version_of(row: RowMapping, *, is_tainted: bool) -> PolicyVersion:
    return PolicyVersion(
        **{name: row[name] for name in _PUBLISHED if name in row},
        state=VersionState(row["state"] or VersionState.PUBLISHED),
        state_since=row["since"] or row["published_at"],
        reason=row["reason"] or "",
        is_tainted=is_tainted,
        collected_at=row["collected_at"],
    )
