from dataclasses import replace

import pytest

from server.delivery import (
    DIRECT,
    Move,
    Promote,
    Reject,
    Restore,
    Routed,
    Switch,
    TakeBack,
    Try,
    Unload,
    destination,
    plan,
    rollback_target,
)
from server.trial import Ruling, Verdict
from tests.rows import version
from thumbloop.errors import (
    InvalidRequest,
    PolicyVersionUnavailable,
    UnknownPolicyVersion,
    VersionConflict,
)
from thumbloop.lines import descendants
from thumbloop.types import PolicyVersion, VersionState

PUBLISHED, ATTESTED, CANARY = VersionState.PUBLISHED, VersionState.ATTESTED, VersionState.CANARY
CURRENT, RETIRED, REJECTED = VersionState.CURRENT, VersionState.RETIRED, VersionState.REJECTED
ROLLED_BACK = VersionState.ROLLED_BACK


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


def tainted(versions: list[PolicyVersion], *learned: int) -> list[PolicyVersion]:
    """Return the versions with these and what grew from them tainted."""
    marked = {*learned, *descendants(versions, learned)}
    return [replace(v, is_tainted=v.version in marked) for v in versions]


# 0 <- 1 <- 2 is current and tainted, 3 was learned anew from 1.
_REBUILT = tainted(rows(RETIRED, RETIRED, CURRENT, PUBLISHED, parents={3: 1}), 2)
_ON_TRIAL = tainted(rows(RETIRED, RETIRED, CURRENT, CANARY, parents={3: 1}), 2)
_NOT_CURRENT = "parent: it was trained from version 1, but version 2 is current"

TABLE = {
    "what was learned anew takes a tainted version's place": (_REBUILT, {2}, [Try(3)]),
    "from any clean ancestor": (
        tainted(rows(RETIRED, RETIRED, CURRENT, PUBLISHED, parents={3: 0}), 2),
        {2},
        [Try(3)],
    ),
    "but only a tainted one's": (
        rows(RETIRED, RETIRED, CURRENT, PUBLISHED, parents={3: 1}),
        {2},
        [Reject(3, _NOT_CURRENT)],
    ),
    "and not if it is tainted itself": (
        tainted(rows(RETIRED, RETIRED, CURRENT, PUBLISHED, parents={3: 1}), 1, 2),
        {2},
        [Reject(3, _NOT_CURRENT)],
    ),
    "nor from another line": (
        tainted(rows(RETIRED, ROLLED_BACK, CURRENT, PUBLISHED, parents={2: 0, 3: 1}), 2),
        {2},
        [Reject(3, _NOT_CURRENT)],
    ),
    "what grew from a tainted version may follow it": (
        tainted(rows(RETIRED, CURRENT, PUBLISHED), 1),
        {1},
        [Try(2)],
    ),
    "what was learned anew is loaded after a start on trial": (_ON_TRIAL, {2}, [Restore(3)]),
    "its trial ends where another version came since": (
        [*_ON_TRIAL[:2], replace(_ON_TRIAL[2], state_since=4.0), _ON_TRIAL[3]],
        {2, 3},
        [TakeBack(3, "parent: version 2 came in the place of version 1")],
    ),
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
        rows(CURRENT, ROLLED_BACK),
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
    "there is room before a new version is tried": (
        rows(RETIRED, RETIRED, RETIRED, CURRENT, PUBLISHED),
        {0, 1, 2, 3},
        [Unload(0), Try(4)],
    ),
}


@pytest.mark.parametrize(("versions", "loaded", "expected"), TABLE.values(), ids=TABLE.keys())
def test_the_plan_is(versions, loaded, expected):
    assert plan(versions, loaded, routed=Routed(current_of(versions)), keep=2) == expected


@pytest.mark.parametrize("routed", [None, 1])
def test_a_pointer_that_was_moved_is_followed_before_anything_else(routed: int | None):
    versions = rows(CURRENT, ROLLED_BACK, PUBLISHED, parents={2: 0})
    assert plan(versions, {0, 1}, routed=Routed(routed), keep=2) == [Switch(0), Try(2)]
    assert plan(versions, {1}, routed=Routed(routed), keep=2) == [Restore(0)]


def current_of(versions: list[PolicyVersion]) -> int:
    return next(v.version for v in versions if v.state is CURRENT)


def test_versions_are_kept_by_when_they_served_last_not_by_number():
    versions = rows(RETIRED, RETIRED, RETIRED, CURRENT)
    versions[0] = replace(versions[0], state_since=50.0)  # rolled back to for a while
    assert plan(versions, {0, 1, 2, 3}, routed=Routed(3), keep=2) == [Unload(1)]


@pytest.mark.parametrize(("keep", "gone"), [(3, []), (2, [3]), (1, [4, 3]), (0, [1, 4, 3])])
def test_what_a_rollback_leads_to_stays_longest_and_what_was_taken_back_goes_first(
    keep: int, gone: list[int]
):
    versions = rows(RETIRED, RETIRED, CURRENT, ROLLED_BACK, ROLLED_BACK, parents={3: 2, 4: 2})
    actions = plan(versions, {1, 2, 3, 4}, routed=Routed(2), keep=keep)
    assert actions == [Unload(number) for number in gone]


ON_TRIAL = rows(RETIRED, CURRENT, CANARY)
WITH_WAITING = rows(RETIRED, CURRENT, CANARY, PUBLISHED, PUBLISHED, parents={3: 1, 4: 1})
TRIALS = {
    "a version that passes would be the canary": (
        rows(CURRENT, PUBLISHED),
        {0},
        Routed(0),
        None,
        [Try(1, is_canary=True)],
    ),
    "a share of the users is sent to it": (ON_TRIAL, {1, 2}, Routed(1), None, [Switch(1, 2)]),
    "a trial goes on": (ON_TRIAL, {1, 2}, Routed(1, 2), Verdict.WAIT, []),
    "nobody has looked yet": (ON_TRIAL, {1, 2}, Routed(1, 2), None, []),
    "a start takes up the current version first": (
        ON_TRIAL,
        set(),
        Routed(),
        Verdict.PROMOTE,
        [Restore(1)],
    ),
    "and then the canary": (ON_TRIAL, {1}, Routed(1), Verdict.PROMOTE, [Restore(2)]),
    "what its users like is promoted, and they keep it": (
        ON_TRIAL,
        {1, 2},
        Routed(1, 2),
        Verdict.PROMOTE,
        [Promote(2, "why")],
    ),
    "what they do not is taken back, as soon as nobody is sent there": (
        ON_TRIAL,
        {1, 2},
        Routed(1, 2),
        Verdict.ROLL_BACK,
        [Switch(1), TakeBack(2, "why")],
    ),
    "what they do not is not even loaded": (
        ON_TRIAL,
        {1},
        Routed(1),
        Verdict.ROLL_BACK,
        [TakeBack(2, "why")],
    ),
    "undecided is not promoted": (
        ON_TRIAL,
        {1, 2},
        Routed(1, 2),
        Verdict.UNDECIDED,
        [Switch(1), TakeBack(2, "why")],
    ),
    "without its parent a trial has no control": (
        rows(CURRENT, ROLLED_BACK, CANARY),
        {0, 2},
        Routed(0),
        None,
        [TakeBack(2, "parent: version 0 came in the place of version 1")],
    ),
    "one version waits for the end, an older one does not": (
        WITH_WAITING,
        {1, 2},
        Routed(1, 2),
        Verdict.WAIT,
        [Reject(3, "superseded: version 4 is newer")],
    ),
    "a canary is not unloaded": (
        rows(RETIRED, RETIRED, RETIRED, CURRENT, CANARY),
        {0, 1, 2, 3, 4},
        Routed(3, 4),
        Verdict.WAIT,
        [Unload(0)],
    ),
}


@pytest.mark.parametrize(
    ("versions", "loaded", "routed", "verdict", "expected"), TRIALS.values(), ids=TRIALS.keys()
)
def test_of_trials_the_plan_is(versions, loaded, routed, verdict, expected):
    ruling = verdict and Ruling(verdict, "why")
    found = plan(versions, loaded, routed=routed, keep=2, has_trials=True, ruling=ruling)
    assert found == expected


def test_without_trials_a_canary_that_there_is_becomes_current():
    found = plan(ON_TRIAL, {1, 2}, routed=Routed(1, 2), keep=2)
    assert found == [Promote(2, DIRECT)]
    assert plan(ON_TRIAL, {1}, routed=Routed(1), keep=2) == [Restore(2)]
    bad = Ruling(Verdict.ROLL_BACK, "errors")
    taken_back = [Switch(1), TakeBack(2, "errors")]
    assert plan(ON_TRIAL, {1, 2}, routed=Routed(1, 2), keep=2, ruling=bad) == taken_back


def move(to: int | None, expected: int, *, is_rollback: bool = True) -> Move:
    return Move(to, expected, is_rollback, reason="", actor="ann")


LINE = rows(RETIRED, REJECTED, RETIRED, ROLLED_BACK, CURRENT, PUBLISHED, parents={2: 0})


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


def test_a_rollback_to_the_current_version_takes_back_the_canary():
    assert destination(ON_TRIAL, move(1, 1)).version == 1
    assert destination(ON_TRIAL, move(None, 1)).version == 0  # the current one is taken back
    with pytest.raises(InvalidRequest, match="version 1 is current already"):
        destination(ON_TRIAL, move(1, 1, is_rollback=False))
    assert destination(ON_TRIAL, move(2, 1, is_rollback=False)).version == 2
    with pytest.raises(PolicyVersionUnavailable, match="version 2 is canary"):
        destination(ON_TRIAL, move(2, 1))


def test_what_was_deleted_is_not_moved_to_and_a_rollback_passes_it_by():
    versions = [*LINE[:2], replace(LINE[2], collected_at=9.0), *LINE[3:]]
    for is_rollback in (True, False):
        with pytest.raises(
            PolicyVersionUnavailable, match="version 2 is retired, and its folder was deleted"
        ):
            destination(versions, move(2, 4, is_rollback=is_rollback))
    assert destination(versions, move(None, 4)).version == 0
    assert rollback_target(LINE) == LINE[2]
    assert rollback_target(rows(CURRENT)) is None
    assert rollback_target(rows(ROLLED_BACK, CURRENT)) is None


def test_from_the_base_model_there_is_no_way_back():
    with pytest.raises(PolicyVersionUnavailable, match="nothing to go back to from version 0"):
        destination(rows(CURRENT), move(None, 0))
