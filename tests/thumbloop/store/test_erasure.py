"""What is left of a user who is forgotten: in rows, and in the store's files."""

import random
import time
from dataclasses import replace
from typing import Any

import pytest
import uuid_utils
from sqlalchemy import Connection, Engine, func, select, text

from tests.finding import found, readers
from tests.rows import ANN, BOB, candidate, finished_round, interaction, rated, version
from thumbloop.config import State
from thumbloop.store import (
    deployments,
    erasure,
    feedback,
    interactions,
    lineage,
    open_store,
    preferences,
    reading,
    scrubbing,
    versions,
)
from thumbloop.store.erasure import Erasure
from thumbloop.store.lineage import Influence, Inputs
from thumbloop.store.schema import events, metadata, round_inputs
from thumbloop.types import DEFAULT_POLICY, Prompt, User, VersionState


def erase(store: Engine, user: User) -> Erasure:
    with store.begin() as connection:
        return erasure.erase(connection, DEFAULT_POLICY, user, at=9.0, actor="operator")


def dump(store: Engine, *without: str) -> dict[str, list[Any]]:
    """Return all rows of all tables."""
    with reading(store) as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(select(table))]
            for table in metadata.sorted_tables
            if table.name not in without
        }


def published(store: Engine, number: int, parent: int = 0, **used: Any) -> None:
    """Publish a version whose round used these rows."""
    with store.begin() as connection:
        done = finished_round(number, parent, **used)
        row = version(number, parent, feedback_count=len(done.new_feedback))
        versions.finish_round(connection, done, row)


def tainted(store: Engine) -> list[int]:
    with reading(store) as connection:
        return [
            v.version for v in versions.list_versions(connection, DEFAULT_POLICY) if v.is_tainted
        ]


def count(connection: Connection, table: Any) -> int:
    return int(connection.scalar(select(func.count()).select_from(table)) or 0)


# Rows


def test_all_rows_of_a_user_go_and_those_of_others_stay(store: Engine):
    with store.begin() as connection:
        reply, _ = rated(connection, user=BOB)
        preferences.submit_preference(connection, reply, 1, 0, BOB, at=1.0)
        rated(connection, user=User("backend", "ann"))
    before = dump(store)
    with store.begin() as connection:
        first, _ = rated(connection, user=ANN)
        feedback.submit_thumb(connection, first, 0, ANN, comment="oh no", at=2.0)
        rated(connection, user=ANN, policy_version=3)
        preferences.submit_preference(connection, first, 1, 0, ANN, request_id="once", at=3.0)
    assert erase(store, ANN) == Erasure(interactions=2, feedback=4, tainted=())
    assert dump(store, "events") == {
        name: rows for name, rows in before.items() if name != "events"
    }


def test_erasing_again_finds_nothing_and_leaves_no_event(store: Engine):
    with store.begin() as connection:
        _, thumb = rated(connection, user=ANN)
    published(store, 1, new_feedback=(thumb,))
    assert erase(store, ANN) == Erasure(1, 1, (1,))
    before = dump(store)
    assert erase(store, ANN) == Erasure(0, 0, ())
    assert dump(store) == before


def test_no_event_names_the_user(store: Engine):
    with store.begin() as connection:
        _, thumb = rated(connection, user=User("a subject", "a name"))
    published(store, 1, new_feedback=(thumb,))
    erase(store, User("a subject", "a name"))
    with reading(store) as connection:
        logged = [tuple(row) for row in connection.execute(select(events).order_by(events.c.id))]
    assert "name" not in str(logged)
    assert "subject" not in str(logged)
    kinds = [(row[2], row[4]) for row in logged]
    assert kinds[-2:] == [("erased", None), ("tainted", 1)]


def test_numbers_of_feedback_that_was_erased_are_not_given_again(store: Engine):
    with store.begin() as connection:
        _, last = rated(connection, user=ANN)
    erase(store, ANN)
    with store.begin() as connection:
        _, next_one = rated(connection, user=BOB)
    assert next_one > last


# Taint


def test_who_learned_from_a_user_is_tainted_with_all_descendants(store: Engine):
    with store.begin() as connection:
        anns, thumb = rated(connection, user=ANN)
        preferred = preferences.submit_preference(connection, anns, 1, 0, ANN, at=1.0)
        bobs, other = rated(connection, user=BOB)
    published(store, 1, 0, new_feedback=(other,), rollouts=(bobs,))
    published(store, 2, 1, new_feedback=(thumb,))
    published(store, 3, 2, new_feedback=(other,))
    published(store, 4, 1, new_preferences=(preferred.preference_id,))
    published(store, 5, 1, replayed_feedback=(thumb,))
    published(store, 6, 1, replayed_preferences=(preferred.preference_id,))
    published(store, 7, 1, rollouts=(anns,))
    published(store, 8, 1, rollouts=(bobs,))
    published(store, 9, 3)
    with store.begin() as connection:  # a round that published nothing taught nobody
        blocked = finished_round(20, 1, version=None, new_feedback=(thumb,))
        versions.finish_round(connection, blocked, None)
    assert erase(store, ANN).tainted == (2, 3, 4, 5, 6, 7, 9)
    assert tainted(store) == [2, 3, 4, 5, 6, 7, 9]
    published(store, 10, 9)
    published(store, 11, 8)
    assert tainted(store) == [2, 3, 4, 5, 6, 7, 9, 10]
    with reading(store) as connection:
        for number in range(12):
            found = versions.get(connection, DEFAULT_POLICY, number)
            assert found is not None
            assert found.is_tainted is (number in tainted(store))


def test_the_current_version_and_the_canary_say_that_they_are_tainted(store: Engine):
    with store.begin() as connection:
        _, thumb = rated(connection, user=ANN)
    published(store, 1, new_feedback=(thumb,))
    published(store, 2, 1)
    with store.begin() as connection:
        deployments.set_state(connection, DEFAULT_POLICY, 1, VersionState.CURRENT, at=1.0)
        deployments.set_state(connection, DEFAULT_POLICY, 2, VersionState.CANARY, at=1.0)
        mark = versions.mark(connection, DEFAULT_POLICY)
    erase(store, ANN)
    with reading(store) as connection:
        assert versions.current(connection, DEFAULT_POLICY).is_tainted
        canary = versions.canary(connection, DEFAULT_POLICY)
        assert canary is not None
        assert canary.is_tainted
        assert versions.mark(connection, DEFAULT_POLICY) != mark  # servers look again


def test_a_version_is_found_to_be_tainted_once(store: Engine):
    with store.begin() as connection:
        thumbs = [rated(connection, user=user)[1] for user in (ANN, BOB)]
    published(store, 1, new_feedback=tuple(thumbs))
    assert erase(store, ANN).tainted == erase(store, BOB).tainted == (1,)
    with reading(store) as connection:
        listed = deployments.list_events(connection, DEFAULT_POLICY, 1)
    assert [(row["kind"], row["at"]) for row in listed] == [("tainted", 9.0)]


def test_what_rounds_used_is_still_on_record(store: Engine):
    with store.begin() as connection:
        reply, thumb = rated(connection, user=ANN)
        _, other = rated(connection, user=BOB)
    published(store, 1, new_feedback=(thumb, other), rollouts=(reply,))
    before = dump(store)["round_inputs"]
    erase(store, ANN)
    assert dump(store)["round_inputs"] == before
    with reading(store) as connection:
        assert lineage.inputs_behind(connection, DEFAULT_POLICY, 1) == {
            "round-1": Inputs(new=2, replies=1)
        }
        learned_by = versions.learned_by(connection, DEFAULT_POLICY, 1)
        assert feedback.count_new(connection, DEFAULT_POLICY, learned_by).total == 0
        assert feedback.count_new(connection, DEFAULT_POLICY, []).total == 1
        (left,) = feedback.list_rated(connection, DEFAULT_POLICY, learned_by)
    assert (left.feedback_id, left.is_new) == (other, False)


def test_a_round_is_whole_until_any_of_what_it_used_is_erased(store: Engine):
    with store.begin() as connection:
        anns, thumb = rated(connection, user=ANN)
        preferred = preferences.submit_preference(connection, anns, 1, 0, ANN, at=1.0)
        many = [rated(connection, user=BOB) for _ in range(450)]  # more than are read at a time
    bobs = finished_round(1, new_feedback=tuple(n for _, n in many), rollouts=(many[0][0],))
    of_ann: list[dict[str, Any]] = [
        {"new_feedback": (*bobs.new_feedback, thumb)},
        {"replayed_feedback": (thumb,)},
        {"new_preferences": (preferred.preference_id,)},
        {"replayed_preferences": (preferred.preference_id,)},
        {"rollouts": (*bobs.rollouts, anns)},
    ]
    rounds = [bobs, *(replace(bobs, **changes) for changes in of_ann)]
    with reading(store) as connection:
        assert [erasure.is_whole(connection, each) for each in rounds] == [True] * 6
    erase(store, ANN)
    with reading(store) as connection:
        assert [erasure.is_whole(connection, each) for each in rounds] == [True, *[False] * 5]


# Lineage


def test_a_user_is_traced_through_whatever_rounds_used(store: Engine):
    with store.begin() as connection:
        first, thumb = rated(connection, user=ANN)
        second, again = rated(connection, user=ANN)
        preferred = preferences.submit_preference(connection, first, 1, 0, ANN, at=1.0)
        bobs, other = rated(connection, user=BOB)
    published(store, 1, new_feedback=(thumb, other), rollouts=(first, second, bobs))
    published(
        store,
        2,
        1,
        new_feedback=(again,),
        replayed_feedback=(thumb,),
        new_preferences=(preferred.preference_id,),
    )
    published(store, 3, 2, new_feedback=(), replayed_feedback=(other,))
    with reading(store) as connection:
        assert lineage.learned_from(connection, DEFAULT_POLICY, ANN) == {
            1: Influence(thumbs=1, replies=2),
            2: Influence(thumbs=2, preferences=1),
        }
        assert lineage.learned_from(connection, DEFAULT_POLICY, BOB) == {
            1: Influence(thumbs=1, replies=1),
            3: Influence(thumbs=1),
        }
        assert lineage.learned_from(connection, DEFAULT_POLICY, User("x", "ann")) == {}
        assert lineage.inputs_behind(connection, DEFAULT_POLICY, 2) == {
            "round-1": Inputs(new=2, replies=3),
            "round-2": Inputs(new=2, replayed=1),
        }


@pytest.mark.sqlite
def test_finding_a_user_looks_inputs_up_and_does_not_read_them_all(store: Engine):
    with reading(store) as connection:
        ids = select(interactions.interactions.c.response_id)
        query = lineage._used(DEFAULT_POLICY, ids, ("rollout",))
        words = str(query.compile(connection, compile_kwargs={"literal_binds": True}))
        plan = connection.execute(text(f"EXPLAIN QUERY PLAN {words}")).all()
    assert not [row for row in plan if "SCAN round_inputs" in str(row)], plan
    assert round_inputs.name in words


@pytest.mark.sqlite
def test_erasing_feedback_does_not_read_all_thumbs(store: Engine):
    with reading(store) as connection:
        words = "EXPLAIN QUERY PLAN DELETE FROM thumbs WHERE feedback_id = 1"  # what a cascade does
        (step,) = connection.execute(text(words)).all()
    assert "SEARCH thumbs" in str(step)


# Files


MARK = "CANARY"


def strangers(many: int) -> list[str]:
    """Return names in no order, of which no two are alike."""
    return [f"{MARK}-{random.Random(i).getrandbits(64):016x}" for i in range(many)]


def marked(rng: random.Random, user: str) -> Any:
    """Return a reply to a user all of whose texts hold the user's name."""
    words = f"{user} "
    return interaction(
        str(uuid_utils.uuid7()),
        user=User(user_id=user),
        session_id=f"session of {user}",
        request_id=f"{user}-{rng.getrandbits(64)}",
        request_digest=str(rng.random()),
        prompt=Prompt(text=words * rng.choice([1, 20, 300])),
        candidates=tuple(candidate(k, text=words * rng.choice([1, 20, 100])) for k in range(3)),
    )


def fill(store: Engine, users: list[str], replies: int) -> None:
    rng = random.Random(5)
    with store.begin() as connection:
        for user in rng.choices(users, k=replies):
            reply = marked(rng, user)
            interactions.append(connection, reply)
            said: dict[str, Any] = {"comment": f"{user} said so", "request_id": reply.request_id}
            feedback.submit_thumb(connection, reply.response_id, 1, reply.user, **said, at=1.0)
            said = {"request_id": reply.request_id}
            preferences.submit_preference(
                connection, reply.response_id, 0, 1, reply.user, **said, at=1.0
            )


def scrub(store: Engine) -> None:
    scrubbing.rewrite(store)
    for _ in range(100):
        if scrubbing.empty_log(store, 0.5):
            return
    raise AssertionError("the log is never empty")


@pytest.mark.sqlite
def test_nothing_is_left_in_any_file_while_readers_are_active(store: Engine, state: State):
    users = strangers(200)
    fill(store, users, 2500)
    gone, left = users[:100], users[100:]
    with readers(store, 3, 0.2) as reads:
        for user in gone:
            assert erase(store, User(user_id=user)).interactions
        assert found(state.folder, *gone) == ["thumbloop.db", "thumbloop.db-wal"]
        scrub(store)
        assert found(state.folder, *gone) == []
    assert reads[0] > 3
    for user in left[:5]:
        assert found(state.folder, user) == ["thumbloop.db"]


@pytest.mark.sqlite
def test_deleting_alone_leaves_remains(store: Engine, state: State):
    """Why files are written anew: SQLite's own secure deletion forgets copies in the unused part of pages."""
    users = strangers(200)
    fill(store, users, 2500)
    for user in users[:100]:
        erase(store, User(user_id=user))
    assert scrubbing.empty_log(store, 1.0)
    assert found(state.folder, *users[:100]) == ["thumbloop.db"]


@pytest.mark.sqlite
def test_the_log_is_not_emptied_under_a_reader_of_older_pages(store: Engine, state: State):
    with store.begin() as connection:
        rated(connection, user=ANN)
    with reading(store) as connection:
        assert count(connection, interactions.interactions) == 1
        erase(store, ANN)
        began = time.perf_counter()
        assert not scrubbing.empty_log(store, 0.1)
        assert time.perf_counter() - began < 2
        assert count(connection, interactions.interactions) == 1
    assert scrubbing.empty_log(store, 0.1)
    assert (state.folder / "thumbloop.db-wal").stat().st_size == 0
    with store.begin() as connection:  # the patience of a connection is what it was
        assert connection.scalar(text("PRAGMA busy_timeout")) == 10_000


@pytest.mark.sqlite
def test_rewriting_a_store_changes_no_row(store: Engine, state: State):
    fill(store, ["ann", "bob"], 20)
    before = dump(store)
    scrubbing.rewrite(store)
    assert dump(store) == before
    again = open_store(state)
    with again.begin() as connection:
        assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
    again.dispose()


def test_what_is_still_to_be_scrubbed_is_known_after_a_restart(store: Engine):
    def pending() -> int | None:
        with reading(store) as connection:
            return erasure.unscrubbed(connection)

    assert pending() is None
    with store.begin() as connection:
        for user in (ANN, BOB):
            rated(connection, user=user)
    erase(store, ANN)
    first = pending()
    assert first
    erase(store, BOB)
    second = pending()
    assert second
    assert second > first
    with store.begin() as connection:  # files were scrubbed before the second
        erasure.scrubbed(connection, DEFAULT_POLICY, first, at=1.0)
    assert pending() == second
    with store.begin() as connection:
        erasure.scrubbed(connection, DEFAULT_POLICY, second, at=1.0)
    assert pending() is None


def test_an_error_of_the_database_holds_no_prompt(store: Engine):
    reply = interaction(prompt=Prompt(text=MARK), request_digest="")
    with store.begin() as connection:
        interactions.append(connection, reply)
    with pytest.raises(Exception, match=r"(?i)unique") as raised, store.begin() as connection:
        interactions.append(connection, reply)
    assert MARK not in str(raised.value)
