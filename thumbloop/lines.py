"""Lines of versions: who grew from whom, and which of them are free of what was erased. Pure."""

from collections.abc import Iterable, Iterator

from thumbloop.types import PolicyVersion


def line(known: Iterable[PolicyVersion], version: PolicyVersion) -> Iterator[PolicyVersion]:
    """Yield a version and its ancestors, nearest first, down to the base model."""
    by_number = {each.version: each for each in known}
    yield version
    while version.parent is not None:
        version = by_number[version.parent]
        yield version


def descendants(known: Iterable[PolicyVersion], ancestors: Iterable[int]) -> list[int]:
    """Return the versions that grew from these, without these, in order; `known` are in order, too."""
    family, found = set(ancestors), list[int]()
    for version in known:
        if version.parent in family and version.version not in family:
            family.add(version.version)
            found.append(version.version)
    return found


def may_follow(
    known: Iterable[PolicyVersion], version: PolicyVersion, current: PolicyVersion
) -> bool:
    """Say whether a version may come in the current one's place.

    It does where it grew from it; or, where the current one is tainted, from an ancestor of its and is clean.
    """
    if version.parent == current.version:
        return True
    if version.is_tainted or not current.is_tainted:
        return False
    return version.parent in {ancestor.version for ancestor in line(known, current)}
