"""Which version answers: a pure planner over the store's rows and what the engine holds.

It decides, `hotswap` acts, and asks again; so a crash between any two actions is made good by the
next plan.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from thumbloop.errors import (
    InvalidRequest,
    PolicyVersionUnavailable,
    UnknownPolicyVersion,
    VersionConflict,
)
from thumbloop.types import BASE_VERSION, PolicyVersion, VersionState

_WAITING = (VersionState.PUBLISHED, VersionState.ATTESTED)


@dataclass(frozen=True, slots=True)
class Restore:
    """Load the version that the store says is current, after a start."""

    version: int


@dataclass(frozen=True, slots=True)
class Switch:
    """Send new requests to the current version, which is loaded: the pointer was moved."""

    version: int


@dataclass(frozen=True, slots=True)
class Try:
    """Verify, load and attest a published version, and make it current if it passes."""

    version: int


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse a version without loading it."""

    version: int
    reason: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Drain a version and take its adapters out of the engine."""

    version: int


Action = Restore | Switch | Try | Reject | Unload


def plan(
    versions: Sequence[PolicyVersion], loaded: Collection[int], *, routed: int | None, keep: int
) -> list[Action]:
    """Return the next actions, in order; empty when there is nothing to do.

    `versions` are all rows of one policy, oldest first; `loaded` what the engine holds and answers
    from; `routed` which of them new requests go to, None after a start; `keep` how many versions
    besides the current one stay loaded for pins and rollback.
    """
    current = _current(versions)
    if current.version not in loaded:
        return [Restore(current.version)]
    waiting = [v for v in versions if v.state in _WAITING and v.version != BASE_VERSION]
    actions: list[Action] = [Switch(current.version)] if routed != current.version else []
    actions += [_decide(v, newest=waiting[-1], current=current) for v in waiting]
    return actions + _surplus(versions, loaded, current.version, keep)


def _current(versions: Sequence[PolicyVersion]) -> PolicyVersion:
    (current,) = [v for v in versions if v.state is VersionState.CURRENT]
    return current


def _decide(version: PolicyVersion, *, newest: PolicyVersion, current: PolicyVersion) -> Action:
    """Try the newest version if it grew from the current one; refuse the others."""
    if version is not newest:
        return Reject(version.version, f"superseded: version {newest.version} is newer")
    if version.parent != current.version:
        return Reject(
            version.version,
            f"parent: it was trained from version {version.parent},"
            f" but version {current.version} is current",
        )
    return Try(version.version)


def _surplus(
    versions: Sequence[PolicyVersion], loaded: Collection[int], current: int, keep: int
) -> list[Action]:
    """Unload what served before, but for the `keep` latest."""
    served = [v for v in versions if v.version in loaded and v.version != current]
    latest_first = sorted(served, key=lambda v: (v.state_since, v.version), reverse=True)
    return [Unload(v.version) for v in latest_first[keep:]]


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


def destination(versions: Sequence[PolicyVersion], move: Move) -> PolicyVersion:
    """Return the version that a move leads to.

    Raises VersionConflict: another than the expected one is current. UnknownPolicyVersion.
    InvalidRequest: it is current already. PolicyVersionUnavailable: it was rejected; or a rollback
    leads to one that never served or was taken back, or there is nothing to go back to.
    """
    current = _current(versions)
    if current.version != move.expected:
        raise VersionConflict(
            f"version {move.expected} is not current, version {current.version} is"
        )
    by_number = {v.version: v for v in versions}
    if move.to is None:
        return _ancestor(current, by_number)
    if move.to not in by_number:
        raise UnknownPolicyVersion(f"there is no version {move.to}")
    found = by_number[move.to]
    if found is current:
        raise InvalidRequest.of("policy_version", f"version {move.to} is current already")
    is_barred = found.state is VersionState.REJECTED
    if is_barred or (move.is_rollback and found.state is not VersionState.RETIRED):
        why = f" ({found.reason})" if found.reason else ""
        raise PolicyVersionUnavailable(f"version {move.to} is {found.state.value}{why}")
    return found


def _ancestor(version: PolicyVersion, by_number: Mapping[int, PolicyVersion]) -> PolicyVersion:
    """Return the nearest ancestor that served and was not taken back."""
    parent = version.parent
    while parent is not None:
        found = by_number[parent]
        if found.state is VersionState.RETIRED:
            return found
        parent = found.parent
    raise PolicyVersionUnavailable(f"there is nothing to go back to from version {version.version}")
