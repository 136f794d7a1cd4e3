from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.delivery import Reject, Restore, Try, Unload, plan
from tests.rows import version
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
    assert plan(versions, loaded, keep=2) == expected


def test_versions_are_kept_by_when_they_served_last_not_by_number():
    versions = rows(RETIRED, RETIRED, CURRENT)
    versions[0] = replace(versions[0], state_since=50.0)  # rolled back to for a while
    assert plan(versions, {0, 1, 2}, keep=1) == [Unload(1)]
    assert plan(versions, {0, 1, 2}, keep=0) == [Unload(0), Unload(1)]


class World:
    """Carries out plans as the swapper would, with checks that fail when they are told to."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.versions = rows(CURRENT)
        self.loaded: set[int] = set()
        self.clock = 100.0

    @property
    def current(self) -> int:
        (current,) = [v.version for v in self.versions if v.state is CURRENT]
        return current

    def publish(self, parent: int) -> None:
        number = len(self.versions)
        self.versions.append(version(number, parent % number, state_since=float(number)))

    def step(self, *, passes: bool) -> None:
        actions = plan(self.versions, self.loaded, keep=self.keep)
        assert sum(isinstance(a, Try | Restore) for a in actions) <= 1
        for action in actions:
            match action:
                case Restore(number):
                    assert number == self.current
                    self.loaded.add(number)
                case Try(number):
                    assert self.versions[number].parent == self.current
                    assert number not in self.loaded
                    if passes:
                        self._set(self.current, RETIRED)
                        self._set(number, CURRENT)
                        self.loaded.add(number)
                    else:
                        self._set(number, REJECTED)
                case Reject(number):
                    assert self.versions[number].state in (PUBLISHED, ATTESTED)
                    self._set(number, REJECTED)
                case Unload(number):
                    assert number != self.current
                    self.loaded.remove(number)

    def _set(self, number: int, state: VersionState) -> None:
        self.clock += 1
        self.versions[number] = replace(self.versions[number], state=state, state_since=self.clock)


EVENTS = st.one_of(
    st.tuples(st.just("publish"), st.integers(0, 20)),
    st.tuples(st.just("publish child"), st.just(0)),
    st.tuples(st.just("step"), st.integers(0, 1)),
    st.tuples(st.just("restart"), st.just(0)),
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
        else:
            world.step(passes=bool(argument))
            assert len(world.loaded) <= keep + 2
    for _ in range(3):
        world.step(passes=True)
    assert world.current in world.loaded
    assert len(world.loaded) <= keep + 1
    assert all(v.state not in (PUBLISHED, ATTESTED) for v in world.versions)
    assert plan(world.versions, world.loaded, keep=keep) == []
