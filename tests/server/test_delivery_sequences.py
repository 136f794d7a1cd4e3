"""Whatever happens in whatever order, on one server or two, the planner's actions are sound, and no folder is
deleted that somebody needs."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import delivery
from server.delivery import (
    Action,
    Move,
    Promote,
    Reject,
    Restore,
    Routed,
    Switch,
    TakeBack,
    Try,
    Unload,
    canary_of,
    current_of,
    destination,
    is_beside,
    plan,
    rollback_target,
)
from server.references import collectable
from server.trial import Ruling, Verdict
from tests.rows import version
from thumbloop import lines
from thumbloop.errors import InvalidRequest, PolicyVersionUnavailable, VersionConflict
from thumbloop.types import WAITING, PolicyVersion, VersionState

SEQUENCES = 10_000


class Store:
    """The rows, and what may be changed when: the ledger's rules."""

    def __init__(self) -> None:
        self.versions = [version(0, None, state=VersionState.CURRENT)]
        self.damaged = 0  # versions that answered, and could not be taken up again
        self.rebuilt = 0  # versions that came in a tainted one's place without having grown from it
        self._learned_from_erased: set[int] = set()
        self._clock = 100.0

    @property
    def current(self) -> int:
        return current_of(self.versions).version

    @property
    def canary(self) -> int | None:
        found = canary_of(self.versions)
        return found.version if found else None

    def publish(self, parent: int) -> None:
        number = len(self.versions)
        self.versions.append(version(number, parent, state_since=float(number)))
        self._mark()

    def rebuild(self) -> None:
        """Publish what the trainer learns from the last clean version behind the current one."""
        line = lines.line(self.versions, self.versions[self.current])
        self.publish(next(v.version for v in line if not v.is_tainted))

    def taint(self, number: int) -> None:
        """Find that a version's own round learned from data that was erased; the base model learned nothing."""
        self._learned_from_erased |= {number % len(self.versions)} - {0}
        self._mark()

    def _mark(self) -> None:
        for number, row in enumerate(self.versions):
            of_parent = row.parent is not None and self.versions[row.parent].is_tainted
            is_tainted = of_parent or number in self._learned_from_erased
            self.versions[number] = replace(row, is_tainted=is_tainted)

    def decide(self, number: int, state: VersionState) -> None:
        _expect(self.versions[number].state in WAITING)
        self._set(number, state)

    def make_current(self, number: int, expected: int, leaves_as: VersionState) -> None:
        _expect(self.current == expected)
        self._set(expected, leaves_as)
        self._set(number, VersionState.CURRENT)

    def begin_trial(self, number: int, expected: int) -> None:
        _expect(self.current == expected and self.canary is None)
        _expect(self.versions[number].state in WAITING)
        self._set(number, VersionState.CANARY)

    def end_trial(self, number: int, expected: int) -> None:
        _expect(self.current == expected and self.canary == number)
        self._set(number, VersionState.ROLLED_BACK)

    def collect(self, number: int) -> None:
        self.versions[number] = replace(self.versions[number], collected_at=self._clock)

    @property
    def there(self) -> set[int]:
        """Return the versions whose folders are there."""
        return {v.version for v in self.versions if v.collected_at is None}

    def needed(self) -> set[int]:
        """Return what the rows need, said in other words than the code's."""
        needed = {0, self.current, self.canary or 0}
        for each in self.versions:
            if each.state in WAITING:
                needed |= {each.version, each.parent or 0}
        try:
            back = Move(None, self.current, is_rollback=True, reason="", actor="")
            return needed | {destination(self.versions, back).version}
        except PolicyVersionUnavailable:
            return needed

    def _set(self, number: int, state: VersionState) -> None:
        assert number in self.there, "what was deleted never serves again"
        self._clock += 1
        self.versions[number] = replace(self.versions[number], state=state, state_since=self._clock)


def _expect(condition: bool) -> None:
    if not condition:
        raise VersionConflict("another was faster")


class Server:
    """One engine on the store. It plans, and then acts, one action at a time."""

    def __init__(self, store: Store, keep: int) -> None:
        self.store = store
        self.keep = keep
        self.room = keep + 3
        self.loaded: set[int] = set()
        self.routed = Routed()
        self._pending: list[Action] = []
        self._seen: list[PolicyVersion] = []
        self._idle: list[int] = []
        self._is_crowded = False
        self._has_started = False

    def restart(self) -> None:
        self.loaded, self.routed, self._pending, self._idle = set(), Routed(), [], []
        self._has_started = False

    def plan(self, *, has_trials: bool, verdict: Verdict | None) -> list[Action]:
        self._seen = list(self.store.versions)
        ruling = Ruling(verdict, "why") if verdict and self.store.canary is not None else None
        return plan(
            self._seen,
            self.loaded,
            routed=self.routed,
            keep=self.keep,
            has_trials=has_trials,
            ruling=ruling,
        )

    def begin(self, *, has_trials: bool, verdict: Verdict | None) -> None:
        """Plan, unless the last plan is still being carried out."""
        if not self._pending:
            self._is_crowded = False
            answering = {self.store.current, self.store.canary or self.store.current}
            self._has_started |= answering <= self.loaded
            self._pending = self.plan(has_trials=has_trials, verdict=verdict)
            assert sum(isinstance(a, Try | Restore) for a in self._pending) <= 1

    def act(self, *, passes: bool) -> None:
        """Carry out the next action; what no longer fits ends the plan."""
        if self._pending:
            try:
                self._perform(self._pending.pop(0), passes=passes)
            except VersionConflict:
                self._pending = []

    def _perform(self, action: Action, *, passes: bool) -> None:
        store, number = self.store, action.version
        current = current_of(self._seen).version
        match action:
            case Restore():
                if not passes:
                    self._fall_back(number, current)
                    return
                self._load(number)
            case Switch(canary=canary):
                assert {number, canary or number} <= self.loaded
                self.routed = Routed(number, canary)
            case Try(is_canary=is_canary):
                self._check_origin(number, current)
                if not passes:
                    store.decide(number, VersionState.REJECTED)
                    return
                self._load(number)
                store.decide(number, VersionState.ATTESTED)
                if is_canary:
                    store.begin_trial(number, current)
                else:
                    store.make_current(number, current, VersionState.RETIRED)
                    self.routed = Routed(number)
            case Promote():
                assert number in self.loaded
                self._check_origin(number, current)
                _expect(store.versions[number].state is VersionState.CANARY)
                store.make_current(number, current, VersionState.RETIRED)
                self.routed = Routed(number)
            case TakeBack():
                assert self.routed.canary is None
                store.end_trial(number, current)
            case Reject():
                store.decide(number, VersionState.REJECTED)
            case Unload():
                assert number not in self.routed
                self.loaded.remove(number)

    def _fall_back(self, number: int, current: int) -> None:
        """Take back what answered and is damaged, at a start; a server that runs goes on with what it has."""
        _expect(not self._has_started)
        if number != current:
            self.store.end_trial(number, current)
            self.store.damaged += 1
            return
        _expect(number != 0)  # without its base model a server ends
        found = rollback_target(self._seen)
        self.store.make_current(found.version if found else 0, number, VersionState.ROLLED_BACK)
        self.store.damaged += 1

    def _check_origin(self, number: int, current: int) -> None:
        """See that a version that comes grew from the current one, or is clean where that is not, and of its line."""
        came, was = self._seen[number], self._seen[current]
        if came.parent != current:
            assert was.is_tainted
            assert not came.is_tainted
            assert came.parent in {v.version for v in lines.line(self._seen, was)}
            self.store.rebuilt += 1

    def move(self, to: int, *, is_rollback: bool, is_written: bool = True) -> None:
        """Do what an operator asks this server for; where that cannot be written the version stays loaded."""
        store = self.store
        asked = Move(to % len(store.versions), store.current, is_rollback, reason="", actor="ann")
        try:
            found = destination(store.versions, asked)
        except (InvalidRequest, PolicyVersionUnavailable):
            return
        if found.version not in self.loaded:
            if len(self.loaded) == self.room:
                return  # until the planner has unloaded something
            self._load(found.version)
        if not is_written:
            self._is_crowded = True  # beyond what was planned
            return
        if found.version == store.current:
            assert store.canary is not None
            store.end_trial(store.canary, store.current)
        else:
            store.make_current(found.version, store.current, asked.leaves_as)
        self.routed = Routed(found.version)
        self._pending = []

    def look(self, keep: int) -> None:
        """See which folders may go."""
        self._idle = [v.version for v in self._collectable(keep)]

    def collect(self, keep: int, others: set[int]) -> None:
        """Delete the next of them, where no lock of another server's is on it and the store agrees still."""
        number = self._idle.pop(0) if self._idle else None
        if number in {v.version for v in self._collectable(keep)} - others:
            assert number is not None
            before = self.store.needed()
            self.store.collect(number)
            assert number not in before
            assert before <= self.store.there, "nobody's way back was taken away"

    def _collectable(self, keep: int) -> list[PolicyVersion]:
        return collectable(self.store.versions, held=self.loaded, keep=keep)

    def _load(self, number: int) -> None:
        if number not in self.store.there:
            assert number not in self.store.needed()
            raise VersionConflict("it was deleted since that was planned")
        if number not in self.loaded and len(self.loaded) == self.room:
            assert self._is_crowded, "the planner makes room first"
            raise VersionConflict("there is no room")
        self.loaded.add(number)

    def check(self) -> None:
        assert {n for n in self.routed if n is not None} <= self.loaded


Event = tuple[str, int]
NAMES = (
    *("publish", "child", "rebuild", "taint"),
    *("plan", "act", "act", "act", "restart", "promote", "roll back", "fail to promote", "mode"),
    *("look", "collect", "collect"),
)


def play(keep: int, events: list[Event], folders: int = 1) -> Store:
    """Let events happen to two servers on one store, then let these come to rest; return the store.

    `keep` is how many versions an engine holds beyond its need, `folders` how many the folder does.
    """
    store = Store()
    servers = [Server(store, keep), Server(store, keep)]
    has_trials = True
    verdicts = (None, *Verdict)
    for name, number in events:
        server = servers[number % 2]
        match name:
            case "publish":
                parents = sorted(store.there)  # a trainer's was current a moment ago
                store.publish(parents[number % len(parents)])
            case "child":
                store.publish(store.current)
            case "rebuild":
                store.rebuild()
            case "taint":
                store.taint(number)
            case "plan":
                server.begin(has_trials=has_trials, verdict=verdicts[number % len(verdicts)])
            case "act":
                server.act(passes=number % 5 != 0)
            case "restart":
                server.restart()
            case "promote" | "roll back":
                server.move(number, is_rollback=name == "roll back")
            case "fail to promote":
                server.move(number, is_rollback=False, is_written=False)
            case "mode":
                has_trials = not has_trials
            case "look":
                server.look(folders)
            case "collect":
                server.collect(folders, servers[1 - number % 2].loaded)
        assert store.current is not None  # exactly one, and at most one canary: else it raises
        assert store.canary is None or store.canary != store.current
        assert store.needed() <= store.there
        for each in servers:
            each.check()
            assert each.loaded <= store.there
    _rest(store, servers)
    _collect_all(store, servers, folders)
    return store


def _collect_all(store: Store, servers: list[Server], folders: int) -> None:
    """Whatever may go goes, and what is left is bounded."""
    loaded = set[int]().union(*(server.loaded for server in servers))
    for server, other in zip(servers, reversed(servers), strict=True):
        server.look(folders)
        for _ in store.versions:
            server.collect(folders, other.loaded)
    assert len(store.there) <= folders + len(store.needed() | loaded)


def _rest(store: Store, servers: list[Server]) -> None:
    for _ in range(12):
        for server in servers:
            server.begin(has_trials=True, verdict=None)
            for _ in range(len(store.versions) + 3):
                server.act(passes=True)
    for server in servers:
        assert server.plan(has_trials=True, verdict=None) == []
        assert server.routed == (store.current, store.canary)
        answering = {n for n in server.routed if n is not None}
        assert answering <= server.loaded
        assert len(server.loaded) <= server.keep + len(answering)
    if store.canary is None:
        assert all(v.state not in WAITING for v in store.versions)
    else:
        assert is_beside(
            store.versions, store.versions[store.canary], store.versions[store.current]
        )
        assert sum(v.state in WAITING for v in store.versions) <= 1


EVENTS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 29)), max_size=60)


@given(st.integers(0, 3), EVENTS, st.integers(1, 3))
def test_whatever_happens_the_plan_is_sound(keep: int, events: list[Event], folders: int):
    play(keep, events, folders)


def test_ten_thousand_sequences_of_events_are_sound():
    rng = Random(20261128)
    seen, rebuilt, damaged = set(), 0, 0
    for _ in range(SEQUENCES):
        events = [(rng.choice(NAMES), rng.randrange(30)) for _ in range(rng.randrange(80))]
        seen.update(name for name, _ in events)
        played = play(rng.randrange(4), events, rng.randrange(1, 4))
        rebuilt += played.rebuilt
        damaged += played.damaged
    assert seen == set(NAMES)
    assert rebuilt > SEQUENCES / 20
    assert damaged > SEQUENCES / 50


@pytest.mark.parametrize(
    "breaks",
    [
        pytest.param(lambda a: [x for x in a if not isinstance(x, Switch)], id="no switch"),
        pytest.param(lambda a: [x for x in a if not isinstance(x, TakeBack)], id="no take-back"),
        pytest.param(lambda a: [x for x in a if not isinstance(x, Unload)], id="no unload"),
        pytest.param(lambda a: [x for x in a if not isinstance(x, Reject)], id="no rejection"),
    ],
)
def test_a_planner_that_leaves_something_out_is_found_out(
    breaks: Callable[[list[Action]], list[Action]], monkeypatch: pytest.MonkeyPatch
):
    sound = plan
    monkeypatch.setitem(globals(), "plan", lambda *rows, **options: breaks(sound(*rows, **options)))
    with pytest.raises(AssertionError):
        test_ten_thousand_sequences_of_events_are_sound()


@pytest.mark.parametrize(
    "breaks",
    [
        pytest.param(lambda _found, rows, _held: rows[1:], id="anything"),
        pytest.param(lambda _found, _rows, _held: [], id="nothing"),
        pytest.param(
            lambda _found, rows, held: [
                v for v in rows[1:] if v.version not in held and v.state is VersionState.RETIRED
            ],
            id="where a rollback leads",
        ),
        pytest.param(
            lambda found, rows, _held: found or [v for v in rows[1:] if v.state in WAITING],
            id="what waits",
        ),
        pytest.param(
            lambda found, rows, held: (
                found or [v for v in rows if v.version in held and v.state is VersionState.RETIRED]
            ),
            id="what is loaded",
        ),
    ],
)
def test_a_collector_that_takes_too_much_or_nothing_is_found_out(
    breaks: Callable[..., list[PolicyVersion]], monkeypatch: pytest.MonkeyPatch
):
    sound = collectable

    def broken(rows: list[PolicyVersion], *, held: set[int], keep: int) -> list[PolicyVersion]:
        return breaks(sound(rows, held=held, keep=keep), rows, held)

    monkeypatch.setitem(globals(), "collectable", broken)
    with pytest.raises(AssertionError):
        test_ten_thousand_sequences_of_events_are_sound()


def test_a_planner_that_takes_versions_of_any_line_is_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(delivery, "may_follow", lambda *_versions: True)
    with pytest.raises(AssertionError):
        test_ten_thousand_sequences_of_events_are_sound()
