import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import IntegrityError

from tests.rows import finished_round, version
from thumbloop.store import deployments, reading, versions
from thumbloop.types import DEFAULT_POLICY, VersionState


def publish(connection: Connection, number: int, parent: int = 0, **changes) -> None:
    versions.finish_round(
        connection, finished_round(number, parent), version(number, parent, **changes)
    )


def states(connection: Connection) -> dict[int, VersionState]:
    return {v.version: v.state for v in versions.list_versions(connection, DEFAULT_POLICY)}


def test_a_published_version_comes_back_as_it_was_written(store: Engine):
    row = version(
        1,
        feedback_count=3,
        first_feedback_id=4,
        last_feedback_id=9,
        metrics={"reward_auroc": 0.75},
    )
    with store.begin() as connection:
        versions.finish_round(connection, finished_round(1), row)
    with reading(store) as connection:
        read = versions.get(connection, DEFAULT_POLICY, 1)
        assert versions.get(connection, DEFAULT_POLICY, 2) is None
        assert versions.get(connection, "another", 1) is None
    expected = dataclasses.asdict(row) | {"state_since": row.published_at}
    assert read is not None
    assert dataclasses.asdict(read) == expected


def test_numbers_go_up_and_are_never_given_twice(store: Engine):
    with store.begin() as connection:
        assert versions.next_number(connection, DEFAULT_POLICY) == 1
        publish(connection, 1)
        deployments.set_state(connection, DEFAULT_POLICY, 1, VersionState.REJECTED, at=1.0)
        assert versions.next_number(connection, DEFAULT_POLICY) == 2
    with pytest.raises(IntegrityError), store.begin() as connection:
        versions.finish_round(connection, finished_round(2), version(1))


def test_a_round_and_its_version_are_stored_together_or_not_at_all(store: Engine):
    with store.begin() as connection:
        publish(connection, 1)
    done = finished_round(2, new_feedback=(1, 2), rollouts=("a",))
    with pytest.raises(IntegrityError), store.begin() as connection:
        versions.finish_round(connection, done, version(1, round_id="round-2"))
    with reading(store) as connection:
        assert [r["round_id"] for r in versions.list_rounds(connection, DEFAULT_POLICY)] == [
            "round-1"
        ]
        assert connection.scalar(text("SELECT count(*) FROM round_inputs")) == 0


def test_a_round_that_published_nothing_says_why_and_what_it_used(store: Engine):
    with store.begin() as connection:
        done = finished_round(1, version=None, reason="gate: AUROC", new_feedback=(4,))
        versions.finish_round(connection, done, None)
        (row,) = versions.list_rounds(connection, DEFAULT_POLICY)
        assert (row["version"], row["reason"]) == (None, "gate: AUROC")
        assert states(connection) == {0: VersionState.CURRENT}
        assert versions.feedback_by_version(connection, DEFAULT_POLICY) == {}


def test_the_same_row_may_be_new_replayed_and_a_rollout(store: Engine):
    with store.begin() as connection:
        done = finished_round(1, new_feedback=(1, 2), replayed_feedback=(1,), rollouts=("a", "b"))
        versions.finish_round(connection, done, version(1))
        used = connection.execute(text("SELECT role, row FROM round_inputs ORDER BY role, row"))
        assert [tuple(row) for row in used] == [
            ("new", "1"),
            ("new", "2"),
            ("replay", "1"),
            ("rollout", "a"),
            ("rollout", "b"),
        ]
        assert versions.feedback_by_version(connection, DEFAULT_POLICY) == {1: {1, 2}}


def test_the_rounds_behind_a_version_are_its_own_and_its_ancestors(store: Engine):
    with store.begin() as connection:
        publish(connection, 1, 0)
        publish(connection, 2, 1)
        publish(connection, 3, 1)
        learned = {n: versions.learned_by(connection, DEFAULT_POLICY, n) for n in range(4)}
    assert learned == {
        0: [],
        1: ["round-1"],
        2: ["round-2", "round-1"],
        3: ["round-3", "round-1"],
    }


def test_making_a_version_current_retires_the_one_before(store: Engine):
    with store.begin() as connection:
        publish(connection, 1)
        deployments.set_state(
            connection, DEFAULT_POLICY, 1, VersionState.CURRENT, at=5.0, reason="ok"
        )
        assert states(connection) == {0: VersionState.RETIRED, 1: VersionState.CURRENT}
        now = versions.current(connection, DEFAULT_POLICY)
        assert (now.version, now.state_since, now.reason) == (1, 5.0, "ok")
        before = versions.get(connection, DEFAULT_POLICY, 0)
        assert before is not None
        assert before.reason == "replaced by version 1"


def test_every_move_is_an_event_that_says_who_and_why(store: Engine):
    with store.begin() as connection:
        publish(connection, 1)
        deployments.set_state(connection, DEFAULT_POLICY, 1, VersionState.ATTESTED, at=1.0)
        deployments.set_state(
            connection,
            DEFAULT_POLICY,
            1,
            VersionState.REJECTED,
            at=2.0,
            reason="not_finite",
            actor="an operator",
            detail={"probe": 3},
        )
        events = deployments.list_events(connection, DEFAULT_POLICY)
    assert [(e["kind"], e["version"], e["actor"], e["at"]) for e in events] == [
        ("attested", 1, "server", 1.0),
        ("rejected", 1, "an operator", 2.0),
    ]
    assert events[1]["detail"] == {"reason": "not_finite", "probe": 3}


_NOT_CURRENT = [s for s in VersionState if s is not VersionState.CURRENT]


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    moves=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(VersionState)), max_size=12),
)
def test_exactly_one_version_is_current_whatever_becomes_of_the_others(store: Engine, moves):
    with store.connect() as connection:
        transaction = connection.begin()
        for number in (1, 2, 3):
            publish(connection, number)
        for number, state in moves:
            now = versions.current(connection, DEFAULT_POLICY).version
            if number == now and state in _NOT_CURRENT:
                continue  # nobody demotes the current version but by promoting another
            deployments.set_state(connection, DEFAULT_POLICY, number, state, at=1.0)
            assert list(states(connection).values()).count(VersionState.CURRENT) == 1
        transaction.rollback()
