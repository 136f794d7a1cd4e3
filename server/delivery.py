"""Which version answers: a pure planner over the store's rows and what the engine holds.

It decides, `hotswap` acts, and asks again; so a crash between any two actions is made good by the
next plan.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from server.trial import Ruling, Verdict
from thumbloop.errors import (
    InvalidRequest,
    PolicyVersionUnavailable,
    UnknownPolicyVersion,
    VersionConflict,
)
from thumbloop.lines import line, may_follow
from thumbloop.types import BASE_VERSION, WAITING, PolicyVersion, VersionState

DIRECT = "attested; delivery is direct"


@dataclass(frozen=True, slots=True)
class Restore:
    """Load a version that the store says answers, after a start."""

    version: int


@dataclass(frozen=True, slots=True)
class Switch:
    """Send new requests where the store says: to the current version, and a share of them to the canary.

    Both are loaded; `canary` is None where there is none.
    """

    version: int
    canary: int | None = None


@dataclass(frozen=True, slots=True)
class Try:
    """Verify, load and attest a published version, and let it answer if it passes: a share, or all."""

    version: int
    is_canary: bool = False


@dataclass(frozen=True, slots=True)
class Promote:
    """Make the canary current."""

    version: int
    reason: str


@dataclass(frozen=True, slots=True)
class TakeBack:
    """End the canary's trial without promoting it."""

    version: int
    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse a version without loading it."""

    version: int
    reason: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Drain a version and take its adapters out of the engine."""

    version: int


Action = Restore | Switch | Try | Promote | TakeBack | Reject | Unload


class Routed(NamedTuple):
    """Where new requests go: None for the current version after a start, and for no canary."""

    current: int | None = None
    canary: int | None = None

    @property
    def compared(self) -> tuple[int, ...]:
        """Return the two versions of a trial, whose replies have to come about alike; nothing while none runs."""
        if self.current is None or self.canary is None:
            return ()
        return (self.current, self.canary)


def plan(
    versions: Sequence[PolicyVersion],
    loaded: Collection[int],
    *,
    routed: Routed,
    keep: int,
    has_trials: bool = False,
    ruling: Ruling | None = None,
) -> list[Action]:
    """Return the next actions, in order; empty when there is nothing to do.

    `versions` are all rows of one policy, oldest first; `loaded` what the engine holds and answers
    from; `routed` where new requests go; `keep` how many versions besides those that answer stay loaded
    for pins and rollback. With `has_trials` a version that passes becomes the canary; `ruling` is what
    the trial of the one that there is comes to, None where nobody has looked.
    """
    current, canary = current_of(versions), canary_of(versions)
    surplus = partial(_surplus, versions, loaded, keep)
    if current.version not in loaded:
        return [*surplus(routed), Restore(current.version)]
    ending = None
    if canary:
        ending = _ending(versions, canary, current, has_trials=has_trials, ruling=ruling)
    if isinstance(ending, TakeBack):
        return [*_switch(routed, current, None), ending]
    if canary and canary.version not in loaded:
        answering = (current.version,)
        return [*_switch(routed, current, None), *surplus(answering), Restore(canary.version)]
    actions = _switch(routed, current, canary)
    if ending:
        return [*actions, ending]
    actions += surplus((current.version, canary.version if canary else None))
    waiting = [v for v in versions if v.state in WAITING and v.version != BASE_VERSION]
    for version in waiting:
        if reason := _refusal(versions, version, newest=waiting[-1], current=current):
            actions.append(Reject(version.version, reason))
        elif not canary:  # else it waits for the end of the trial
            actions.append(Try(version.version, is_canary=has_trials))
    return actions


def current_of(versions: Sequence[PolicyVersion]) -> PolicyVersion:
    """Return the version that answers; there is always exactly one."""
    (current,) = [v for v in versions if v.state is VersionState.CURRENT]
    return current


def canary_of(versions: Sequence[PolicyVersion]) -> PolicyVersion | None:
    """Return the version on trial; there is at most one."""
    canaries = [v for v in versions if v.state is VersionState.CANARY]
    assert len(canaries) <= 1, "two versions are on trial"
    return canaries[0] if canaries else None


def _switch(routed: Routed, current: PolicyVersion, canary: PolicyVersion | None) -> list[Action]:
    """Return what sends new requests where they belong; nothing where they go there."""
    there = canary.version if canary else None
    return [] if routed == (current.version, there) else [Switch(current.version, there)]


def is_beside(
    versions: Sequence[PolicyVersion], canary: PolicyVersion, current: PolicyVersion
) -> bool:
    """Say whether a canary is tried beside this current version, and may come in its place."""
    if canary.parent == current.version:
        return True
    has_begun_beside_it = current.state_since <= canary.state_since
    return has_begun_beside_it and may_follow(versions, canary, current)


def _ending(
    versions: Sequence[PolicyVersion],
    canary: PolicyVersion,
    current: PolicyVersion,
    *,
    has_trials: bool,
    ruling: Ruling | None,
) -> Promote | TakeBack | None:
    """Return how a trial ends, None while it goes on."""
    if not is_beside(versions, canary, current):
        reason = f"parent: version {current.version} came in the place of version {canary.parent}"
        return TakeBack(canary.version, reason)
    if ruling is not None and ruling.verdict in (Verdict.ROLL_BACK, Verdict.UNDECIDED):
        return TakeBack(canary.version, ruling.reason)
    if ruling is not None and ruling.verdict is Verdict.PROMOTE:
        return Promote(canary.version, ruling.reason)
    return None if has_trials else Promote(canary.version, DIRECT)


def _refusal(
    versions: Sequence[PolicyVersion],
    version: PolicyVersion,
    *,
    newest: PolicyVersion,
    current: PolicyVersion,
) -> str | None:
    """Return why a version that waits is not tried; None for the newest, if it may follow the current one."""
    if version is not newest:
        return f"superseded: version {newest.version} is newer"
    if not may_follow(versions, version, current):
        return (
            f"parent: it was trained from version {version.parent},"
            f" but version {current.version} is current"
        )
    return None


def _surplus(
    versions: Sequence[PolicyVersion],
    loaded: Collection[int],
    keep: int,
    answering: Collection[int | None],
) -> list[Action]:
    """Unload what served before, but for `keep` of them: always before there is more to load.

    What a rollback leads to comes first, then what was not taken back, each the latest first.
    """
    target = rollback_target(versions)

    def worth(version: PolicyVersion) -> tuple[bool, bool, float, int]:
        is_good = version.state is not VersionState.ROLLED_BACK
        return (version is target, is_good, version.state_since, version.version)

    served = [v for v in versions if v.version in loaded and v.version not in answering]
    return [Unload(v.version) for v in sorted(served, key=worth, reverse=True)[keep:]]


@dataclass(frozen=True, slots=True)
class Move:
    """What an operator asks for: another version in the place of the expected current one.

    A rollback takes that one back, a promotion retires it. `to` is None for a rollback to the
    nearest ancestor that was not taken back itself.
    """

    to: int | None
    expected: int
    is_rollback: bool
    reason: str
    actor: str

    @property
    def leaves_as(self) -> VersionState:
        """Return the state that the version gets that was current."""
        return VersionState.ROLLED_BACK if self.is_rollback else VersionState.RETIRED

    @property
    def why(self) -> str:
        """Return the reason for the event log."""
        return self.reason or ("rolled back" if self.is_rollback else "promoted")

    @property
    def by(self) -> str:
        """Return who asked, for the event log."""
        return self.actor or "operator"


def destination(versions: Sequence[PolicyVersion], move: Move) -> PolicyVersion:
    """Return the version that a move leads to.

    Raises VersionConflict: another than the expected one is current. UnknownPolicyVersion.
    InvalidRequest: it is current already, and a rollback has no canary to take back.
    PolicyVersionUnavailable: it was rejected, or its folder was deleted; or a rollback leads to one that
    never served or was taken back, or there is nothing to go back to.
    """
    current, canary = current_of(versions), canary_of(versions)
    if current.version != move.expected:
        raise VersionConflict(
            f"version {move.expected} is not current, version {current.version} is"
        )
    by_number = {v.version: v for v in versions}
    if move.to is None:
        if (target := rollback_target(versions)) is None:
            raise PolicyVersionUnavailable(
                f"there is nothing to go back to from version {current.version}"
            )
        return target
    if move.to not in by_number:
        raise UnknownPolicyVersion(f"there is no version {move.to}")
    found = by_number[move.to]
    if found is current and canary and move.is_rollback:
        return found  # with all users: the canary is taken back
    if found is current:
        raise InvalidRequest.of("policy_version", f"version {move.to} is current already")
    is_barred = found.state is VersionState.REJECTED
    if is_barred or (move.is_rollback and found.state is not VersionState.RETIRED):
        why = f" ({found.reason})" if found.reason else ""
        raise PolicyVersionUnavailable(f"version {move.to} is {found.state.value}{why}")
    if found.collected_at is not None:
        raise PolicyVersionUnavailable(
            f"version {move.to} is {found.state.value}, and its folder was deleted"
            " (delivery.keep_versions)"
        )
    return found


def rollback_target(versions: Sequence[PolicyVersion]) -> PolicyVersion | None:
    """Return the nearest ancestor of the current version that served, was not taken back and is there still."""
    for found in line(versions, current_of(versions)):
        if found.state is VersionState.RETIRED and found.collected_at is None:
            return found
    return None
