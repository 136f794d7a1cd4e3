"""What the server makes of policy versions, and why: their states, each with an event."""

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from thumbloop.errors import VersionConflict
from thumbloop.store import versions
from thumbloop.store.schema import deployments, events
from thumbloop.types import WAITING, VersionState

COLLECTED = "collected"
"""The kind of event that says that a version's folder was deleted."""


def set_state(
    connection: Connection,
    policy: str,
    version: int,
    state: VersionState,
    *,
    at: float,
    reason: str = "",
    actor: str = "server",
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Move a version to a state, and log the event. Making one current retires the one before."""
    if state is VersionState.CURRENT:
        _retire_current(connection, policy, version, at)
    _write_state(connection, policy, version, state, at, reason)
    connection.execute(
        insert(events).values(
            at=at,
            kind=state.value,
            policy=policy,
            version=version,
            actor=actor,
            detail={"reason": reason, **(detail or {})},
        )
    )


def decide(
    connection: Connection,
    policy: str,
    version: int,
    state: VersionState,
    *,
    at: float,
    reason: str,
) -> None:
    """Say what became of a version that waits. Raises VersionConflict: another server was faster."""
    _lock(connection, policy)
    _expect_state(connection, policy, version, WAITING)
    set_state(connection, policy, version, state, at=at, reason=reason)


def make_current(
    connection: Connection,
    policy: str,
    version: int,
    *,
    expected: int,
    leaves_as: VersionState,
    at: float,
    reason: str,
    actor: str = "server",
    was: Collection[VersionState] | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Make a version current in the place of the expected one, which goes into another state.

    `was` are the states in which it may be, any where that is None.

    `reason` is why the one came, or why the other was taken back. Raises VersionConflict: another one
    is current, or its folder was deleted; nothing is changed then.
    """
    expect_current(connection, policy, expected)
    if was is not None:
        _expect_state(connection, policy, version, was)
    found = versions.get(connection, policy, version)
    if found is not None and found.collected_at is not None:
        raise VersionConflict(f"the folder of version {version} was deleted meanwhile")
    if leaves_as is not VersionState.RETIRED:
        set_state(connection, policy, expected, leaves_as, at=at, reason=reason, actor=actor)
        reason = f"version {expected} was taken back: {reason}"
    set_state(
        connection,
        policy,
        version,
        VersionState.CURRENT,
        at=at,
        reason=reason,
        actor=actor,
        detail=detail,
    )


def begin_trial(
    connection: Connection,
    policy: str,
    version: int,
    *,
    expected: int,
    at: float,
    terms: Mapping[str, Any],
) -> None:
    """Make a version the canary beside the expected current one, and log by which terms it is judged.

    Raises VersionConflict: another one is current, there is a canary, or somebody has decided about the version
    meanwhile; nothing is changed then.
    """
    expect_current(connection, policy, expected)
    _expect_state(connection, policy, version, WAITING)
    if (other := versions.canary(connection, policy)) is not None:
        raise VersionConflict(f"version {other.version} is on trial already")
    set_state(
        connection, policy, version, VersionState.CANARY, at=at, detail={"terms": dict(terms)}
    )


def end_trial(
    connection: Connection,
    policy: str,
    version: int,
    *,
    expected: int,
    at: float,
    reason: str,
    actor: str = "server",
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Take the canary back.

    Raises VersionConflict: another one than the expected is current, or it is no canary any more.
    """
    expect_current(connection, policy, expected)
    found = versions.canary(connection, policy)
    if found is None or found.version != version:
        raise VersionConflict(f"version {version} is not on trial")
    set_state(
        connection,
        policy,
        version,
        VersionState.ROLLED_BACK,
        at=at,
        reason=reason,
        actor=actor,
        detail=detail,
    )


def collect(
    connection: Connection,
    policy: str,
    version: int,
    *,
    at: float,
    reason: str,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Say that a version's folder is deleted: it never serves again. Its state stays what it is.

    `settings` are those that it was trained with, which only its manifest has; None: it cannot be read.
    """
    kept = {} if settings is None else {"settings": dict(settings)}
    connection.execute(
        update(deployments)
        .where(deployments.c.policy == policy, deployments.c.version == version)
        .values(collected_at=at)
    )
    connection.execute(
        insert(events).values(
            at=at,
            kind=COLLECTED,
            policy=policy,
            version=version,
            actor="server",
            detail={"reason": reason} | kept,
        )
    )


def settings_of_collected(
    connection: Connection, policy: str, version: int
) -> Mapping[str, Any] | None:
    """Return the settings that a version was trained with whose folder is deleted; None: nobody knows."""
    said = select(events.c.detail).where(
        events.c.policy == policy, events.c.version == version, events.c.kind == COLLECTED
    )
    details = connection.scalars(said).all()
    found: Mapping[str, Any] | None = details[-1].get("settings") if details else None
    return found


def terms_of_trial(connection: Connection, policy: str, version: int) -> Mapping[str, Any]:
    """Return the terms that a version's latest trial began with."""
    began = (
        select(events.c.detail)
        .where(
            events.c.policy == policy,
            events.c.version == version,
            events.c.kind == VersionState.CANARY.value,
        )
        .order_by(events.c.id.desc())
        .limit(1)
    )
    terms: Mapping[str, Any] = connection.execute(began).scalar_one()["terms"]
    return terms


def _expect_state(
    connection: Connection, policy: str, version: int, states: Collection[VersionState]
) -> None:
    found = versions.get(connection, policy, version)
    if found is None or found.state not in states:
        state = "unknown" if found is None else found.state.value
        raise VersionConflict(f"version {version} is {state} by now")


def _lock(connection: Connection, policy: str) -> int | None:
    """Let other servers wait, where the database lets more than one write; return the current version."""
    of_current = select(deployments.c.version).where(
        deployments.c.policy == policy, deployments.c.state == VersionState.CURRENT.value
    )
    found: int | None = connection.scalar(of_current.with_for_update())
    return found  # who waited for another finds none


def expect_current(connection: Connection, policy: str, expected: int) -> None:
    """Raise VersionConflict where another version is current; hold on to it until the transaction ends."""
    found = _lock(connection, policy)
    if found != expected:
        raise VersionConflict(f"version {expected} is not current{_but(found)}")


def _but(found: int | None) -> str:
    return "" if found is None else f", version {found} is"


def _retire_current(connection: Connection, policy: str, version: int, at: float) -> None:
    others = connection.scalars(
        select(deployments.c.version).where(
            deployments.c.policy == policy,
            deployments.c.state == VersionState.CURRENT.value,
            deployments.c.version != version,
        )
    ).all()
    for other in others:
        reason = f"replaced by version {version}"
        _write_state(connection, policy, other, VersionState.RETIRED, at, reason)


def _write_state(
    connection: Connection, policy: str, version: int, state: VersionState, at: float, reason: str
) -> None:
    connection.execute(
        delete(deployments).where(deployments.c.policy == policy, deployments.c.version == version)
    )
    connection.execute(
        insert(deployments).values(
            policy=policy, version=version, state=state.value, since=at, reason=reason
        )
    )


def list_events(
    connection: Connection, policy: str, version: int | None = None
) -> list[RowMapping]:
    """Return what happened to a policy's versions, or to one of them, oldest first."""
    query = select(events).where(events.c.policy == policy).order_by(events.c.id)
    if version is not None:
        query = query.where(events.c.version == version)
    return list(connection.execute(query).mappings())
