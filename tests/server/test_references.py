"""Which folders may go; whatever happens in whatever order is in test_delivery_sequences.py."""

from dataclasses import replace

from server.references import collectable, references
from tests.rows import version
from thumbloop.types import PolicyVersion, VersionState

RETIRED, ROLLED_BACK = VersionState.RETIRED, VersionState.ROLLED_BACK
REJECTED, CURRENT = VersionState.REJECTED, VersionState.CURRENT
CANARY, PUBLISHED = VersionState.CANARY, VersionState.PUBLISHED


def line(*states: VersionState) -> list[PolicyVersion]:
    """Return versions in these states from 0 on, each a child of the one before and later in its state."""
    return [
        version(number, number - 1 if number else None, state=state, state_since=float(number))
        for number, state in enumerate(states)
    ]


def goes(rows: list[PolicyVersion], keep: int = 1, held: tuple[int, ...] = ()) -> list[int]:
    return [v.version for v in collectable(rows, held=held, keep=keep)]


def test_the_last_ones_stay_and_the_oldest_goes_first():
    rows = line(RETIRED, RETIRED, RETIRED, RETIRED, RETIRED, CURRENT)
    assert goes(rows, keep=1) == [1, 2, 3]
    assert goes(rows, keep=2) == [1, 2]
    assert goes(rows, keep=4) == goes(rows, keep=99) == []


def test_late_is_what_served_last_not_what_was_published_last():
    rows = line(RETIRED, RETIRED, RETIRED, RETIRED, CURRENT)
    rows[1] = replace(rows[1], state_since=50.0)
    assert goes(rows, keep=1) == [2]  # a rollback leads to 3


def test_where_a_rollback_leads_stays_however_old():
    rows = line(RETIRED, RETIRED, ROLLED_BACK, ROLLED_BACK, ROLLED_BACK, CURRENT)
    assert references(rows) == {0, 1, 5}
    assert goes(rows) == [2, 3]


def test_what_was_deleted_is_nobodys_way_back_and_goes_once():
    rows = line(RETIRED, RETIRED, RETIRED, RETIRED, CURRENT)
    rows[3] = replace(rows[3], collected_at=9.0)
    assert references(rows) == {0, 2, 4}
    assert goes(rows) == [1]


def test_what_waits_stays_with_the_parent_that_it_is_compared_with():
    rows = line(RETIRED, RETIRED, RETIRED, RETIRED, CURRENT)
    rows += [version(5, 1, state=PUBLISHED), version(6, 4, state=CANARY)]
    assert references(rows) == {0, 1, 3, 4, 5, 6}
    assert goes(rows) == [2]


def test_what_was_rejected_goes_before_what_served():
    rows = line(RETIRED, RETIRED, RETIRED, CURRENT)
    rows += [version(n, 3, state=REJECTED, state_since=float(n)) for n in (4, 5, 6)]
    assert goes(rows, keep=1) == [4, 5, 6, 1]
    assert goes(rows, keep=3) == [4, 5]


def test_what_this_server_holds_stays():
    rows = line(RETIRED, RETIRED, RETIRED, RETIRED, RETIRED, CURRENT)
    assert goes(rows, held=(1, 3)) == [2]


def test_the_base_model_stays_whatever_becomes_of_it():
    rows = line(ROLLED_BACK, RETIRED, RETIRED, RETIRED, CURRENT)
    assert goes(rows) == [1, 2]


def test_a_row_that_names_a_folder_which_is_not_its_own_takes_nothing_along():
    rows = line(RETIRED, REJECTED, RETIRED, RETIRED, CURRENT)
    assert goes(rows) == [1, 2]
    rows[1] = replace(rows[1], folder="default/../../../home")
    assert goes(rows) == [2]
