from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.delivery import Move, Reject, Restore, Switch, Try, Unload, destination, plan
from tests.rows import version
from thumbloop.errors import (
    InvalidRequest,
    PolicyVersionUnavailable,
    UnknownPolicyVersion,
    VersionConflict,
)
from thumbloop.types import PolicyVersion, VersionState

PUBLISHED, ATTESTED = VersionState.PUBLISHED, VersionState.ATTESTED
CURRENT, RETIRED, REJECTED = VersionState.CURRENT, VersionState.RETIRED, VersionState.REJECTED


def rows(*states: VersionState, parents: dict[int, int] | None = None) -> list[PolicyVersion]:
    """Return versions 0, 1, ... in these states, each grown from the one before."""
    parents = parents or {}
    return [
        version(
            number,
            parents.get(number, number - 1 if number else None),
            state=state,
            state_since=float(number),
        )
        for number, state in enumerate(states)
    ]


TABLE = {
    "nothing to do": (rows(CURRENT), {0}, []),
    "a start loads what is current": (rows(CURRENT), set(), [Restore(0)]),
    "a restart comes back on the same version": (rows(RETIRED, CURRENT), set(), [Restore(1)]),
    "what waits is looked at after the restart": (
        rows(RETIRED, CURRENT, PUBLISHED),
        set(),
        [Restore(1)],
    ),
    "a child of the current version is tried": (rows(CURRENT, PUBLISHED), {0}, [Try(1)]),
    "a crash after attestation tries again": (rows(CURRENT, ATTESTED), {0}, [Try(1)]),
    "a rejected version is not tried again": (rows(CURRENT, REJECTED), {0}, []),
    "a version rolled back is not tried again": (
        rows(CURRENT, VersionState.ROLLED_BACK),
        {0},
        [],
    ),
    "the newest supersedes what waits": (
        rows(CURRENT, PUBLISHED, PUBLISHED, parents={2: 0}),
        {0},
        [Reject(1, "superseded: version 2 is newer"), Try(2)],
    ),
    "a stale parent is refused": (
        rows(RETIRED, CURRENT, PUBLISHED, parents={2: 0}),
        {0, 1},
        [Reject(2, "parent: it was trained from version 0, but version 1 is current")],
    ),
    "the oldest beyond what is kept is unloaded": (
        rows(RETIRED, RETIRED, RETIRED, CURRENT),
        {0, 1, 2, 3},
        [Unload(0)],
    ),
    "a new version is tried before the old is unloaded": (
        rows(RETIRED, RETIRED, RETIRED, CURRENT, PUBLISHED),
        {0, 1, 2, 3},
        [Try(4), Unload(0)],
    ),
}


@pytest.mark.parametrize(("versions", "loaded", "expected"), TABLE.values(), ids=TABLE.keys())
def test_the_plan_is(versions, loaded, expected):
    assert plan(versions, loaded, routed=current_of(versions), keep=2) == expected


@pytest.mark.parametrize("routed", [None, 1])
def test_a_pointer_that_was_moved_is_followed_before_anything_else(routed: int | None):
    versions = rows(CURRENT, VersionState.ROLLED_BACK, PUBLISHED, parents={2: 0})
    assert plan(versions, {0, 1}, routed=routed, keep=2) == [Switch(0), Try(2)]
    assert plan(versions, {1}, routed=routed, keep=2) == [Restore(0)]


def current_of(versions: list[PolicyVersion]) -> int:
    return next(v.version for v in versions if v.state is CURRENT)


def test_versions_are_kept_by_when_they_served_last_not_by_number():
    versions = rows(RETIRED, RETIRED, CURRENT)
    versions[0] = replace(versions[0], state_since=50.0)  # rolled back to for a while
    assert plan(versions, {0, 1, 2}, routed=2, keep=1) == [Unload(1)]
    assert plan(versions, {0, 1, 2}, routed=2, keep=0) == [Unload(0), Unload(1)]


def move(to: int | None, expected: int, *, is_rollback: bool = True) -> Move:
    return Move(to, expected, is_rollback, reason="", actor="ann")


LINE = rows(
    RETIRED, REJECTED, RETIRED, VersionState.ROLLED_BACK, CURRENT, PUBLISHED, parents={2: 0}
)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (move(None, 4), 2),  # 3, its parent, was taken back
        (move(0, 4), 0),
        (move(0, 4, is_rollback=False), 0),
        (move(3, 4, is_rollback=False), 3),
        (move(5, 4, is_rollback=False), 5),
    ],
)
def test_a_move_leads_to(asked: Move, found: int):
    assert destination(LINE, asked).version == found


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        (move(2, 3), VersionConflict, "version 3 is not current, version 4 is"),
        (move(None, 9), VersionConflict, "version 9 is not current, version 4 is"),
        (move(9, 4), UnknownPolicyVersion, "there is no version 9"),
        (move(4, 4), InvalidRequest, "policy_version: version 4 is current already"),
        (move(1, 4), PolicyVersionUnavailable, r"version 1 is rejected \(not_finite\)"),
        (move(1, 4, is_rollback=False), PolicyVersionUnavailable, "version 1 is rejected"),
        (move(3, 4), PolicyVersionUnavailable, "version 3 is rolled_back"),
        (move(5, 4), PolicyVersionUnavailable, "version 5 is published"),
    ],
)
def test_a_move_is_refused(asked: Move, error: type[Exception], words: str):
    versions = [replace(LINE[0]), replace(LINE[1], reason="not_finite"), *LINE[2:]]
    with pytest.raises(error, match=words):
        destination(versions, asked)


def test_from_the_base_model_there_is_no_way_back():
    with pytest.raises(PolicyVersionUnavailable, match="nothing to go back to from version 0"):
        destination(rows(CURRENT), move(None, 0))


class World:
    """Carries out plans as the swapper would, with checks that fail when they are told to."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.versions = rows(CURRENT)
        self.loaded: set[int] = set()
        self.routed: int | None = None
        self.clock = 100.0

    @property
    def current(self) -> int:
        (current,) = [v.version for v in self.versions if v.state is CURRENT]
        return current

    def publish(self, parent: int) -> None:
        number = len(self.versions)
        self.versions.append(version(number, parent % number, state_since=float(number)))

    def step(self, *, passes: bool) -> None:
        actions = plan(self.versions, self.loaded, routed=self.routed, keep=self.keep)
        assert sum(isinstance(a, Try | Restore) for a in actions) <= 1
        for action in actions:
            match action:
                case Restore(number):
                    assert number == self.current
                    self.loaded.add(number)
                    self.routed = number
                case Switch(number):
                    assert number == self.current
                    assert number in self.loaded
                    self.routed = number
                case Try(number):
                    assert self.versions[number].parent == self.current
                    assert number not in self.loaded
                    if passes:
                        self._set(self.current, RETIRED)
                        self._set(number, CURRENT)
                        self.loaded.add(number)
                        self.routed = number
                    else:
                        self._set(number, REJECTED)
                case Reject(number):
                    assert self.versions[number].state in (PUBLISHED, ATTESTED)
                    self._set(number, REJECTED)
                case Unload(number):
                    assert number not in (self.current, self.routed)
                    self.loaded.remove(number)

    def move(self, to: int, *, is_rollback: bool) -> None:
        """An operator's; the server that carries it out may be another one."""
        asked = move(to % len(self.versions), self.current, is_rollback=is_rollback)
        try:
            found = destination(self.versions, asked)
        except (InvalidRequest, PolicyVersionUnavailable):
            return
        self._set(self.current, asked.leaves_as)
        self._set(found.version, CURRENT)

    def _set(self, number: int, state: VersionState) -> None:
        self.clock += 1
        self.versions[number] = replace(self.versions[number], state=state, state_since=self.clock)


EVENTS = st.one_of(
    st.tuples(st.just("publish"), st.integers(0, 20)),
    st.tuples(st.just("publish child"), st.just(0)),
    st.tuples(st.just("step"), st.integers(0, 1)),
    st.tuples(st.just("restart"), st.just(0)),
    st.tuples(st.just("promote"), st.integers(0, 20)),
    st.tuples(st.just("roll back"), st.integers(0, 20)),
)


@given(st.integers(0, 3), st.lists(EVENTS, max_size=40))
def test_whatever_happens_the_plan_is_sound(keep: int, events: list[tuple[str, int]]):
    world = World(keep)
    for name, argument in events:
        if name == "publish":
            world.publish(argument)
        elif name == "publish child":
            world.publish(world.current)
        elif name == "restart":
            world.loaded.clear()
            world.routed = None
        elif name in ("promote", "roll back"):
            world.move(argument, is_rollback=name == "roll back")
        else:
            world.step(passes=bool(argument))
            assert len(world.loaded) <= keep + 2
        assert world.routed is None or world.routed in world.loaded
    for _ in range(3):
        world.step(passes=True)
    assert world.current in world.loaded
    assert len(world.loaded) <= keep + 1
    assert all(v.state not in (PUBLISHED, ATTESTED) for v in world.versions)
    assert world.routed == world.current
    assert plan(world.versions, world.loaded, routed=world.routed, keep=keep) == []
