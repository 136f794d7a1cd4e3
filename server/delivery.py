"""Which version answers: a pure planner over the store's rows and what the engine holds.

It decides, `hotswap` acts, and asks again; so a crash between any two actions is made good by the
next plan.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from thumbloop.types import BASE_VERSION, PolicyVersion, VersionState

_WAITING = (VersionState.PUBLISHED, VersionState.ATTESTED)


@dataclass(frozen=True, slots=True)
class Restore:
    """Load the version that the store says is current, after a start."""

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


Action = Restore | Try | Reject | Unload


def plan(versions: Sequence[PolicyVersion], loaded: Collection[int], *, keep: int) -> list[Action]:
    """Return the next actions, in order; empty when there is nothing to do.

    `versions` are all rows of one policy, oldest first; `loaded` what the engine holds and answers
    from; `keep` how many versions besides the current one stay loaded for pins and rollback.
    """
    (current,) = [v for v in versions if v.state is VersionState.CURRENT]
    if current.version not in loaded:
        return [Restore(current.version)]
    waiting = [v for v in versions if v.state in _WAITING and v.version != BASE_VERSION]
    actions = [_decide(v, newest=waiting[-1], current=current) for v in waiting]
    return actions + _surplus(versions, loaded, current.version, keep)


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
