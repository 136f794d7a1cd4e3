"""Which versions' folders somebody needs, and which may go: a pure function of the store's rows and of what
this server holds. What other processes use, only their locks can say (`thumbloop.leases`)."""

from collections.abc import Collection, Sequence

from server.delivery import canary_of, current_of, rollback_target
from thumbloop.artifacts import folder_of
from thumbloop.types import BASE_VERSION, WAITING, PolicyVersion, VersionState

_SERVED = (VersionState.RETIRED, VersionState.ROLLED_BACK)


def collectable(
    versions: Sequence[PolicyVersion], *, held: Collection[int], keep: int
) -> list[PolicyVersion]:
    """Return the versions whose folders may be deleted, in the order in which they are to go.

    `held` is what this server loads, answers with, or drains. Of those that nobody needs the last `keep`
    stay: those that served before those that were rejected, as only they can serve again, then the latest.
    """
    needed = references(versions) | set(held)
    idle = [v for v in versions if v.state in (*_SERVED, VersionState.REJECTED) and _is_there(v)]
    idle = [v for v in idle if v.version != BASE_VERSION]
    idle.sort(key=lambda v: (v.state in _SERVED, v.state_since, v.version), reverse=True)
    return [v for v in reversed(idle[keep:]) if v.version not in needed]


def references(versions: Sequence[PolicyVersion]) -> set[int]:
    """Return the versions that the store's rows need: those that answer or may come to, where a rollback
    leads, the parents that waiting versions are compared with, and the base model."""
    waiting = [v for v in versions if v.state in WAITING]
    needed = {BASE_VERSION, current_of(versions).version, *(v.version for v in waiting)}
    needed |= {v.parent for v in waiting if v.parent is not None}
    others = (canary_of(versions), rollback_target(versions))
    return needed | {v.version for v in others if v is not None}


def _is_there(version: PolicyVersion) -> bool:
    """Say whether a version has a folder of its own, as far as its row knows."""
    is_its_own = version.folder == folder_of(version.policy, version.version)
    return is_its_own and version.collected_at is None
