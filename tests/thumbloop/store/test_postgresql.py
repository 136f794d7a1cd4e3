"""What only PostgreSQL does: several write at once, and connections break."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine

from tests.postgresql import Cluster
from tests.rows import ANN, interaction
from thumbloop.config import State
from thumbloop.errors import RequestIdTaken, SettingsError, StoreUnavailable, VersionConflict
from thumbloop.store import (
    GroupWriter,
    deployments,
    feedback,
    interactions,
    only_trainer,
    open_store,
    preferences,
    reading,
    writing,
)
from thumbloop.types import DEFAULT_POLICY, VersionState


@pytest.fixture
def url(postgresql: Cluster) -> str:
    return postgresql.new_database()


@pytest.fixture
def servers(url: str, tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    """Two servers' stores: one database, state folders of their own."""
    one, two = (open_store(State(folder=tmp_path / name, url=url)) for name in ("one", "two"))
    yield one, two
    one.dispose()
    two.dispose()


def at_once(servers: tuple[Engine, Engine], change: Callable[[Connection, int], object]) -> list:
    """Let both make a change, again and again, each time together; return what came of it."""
    together = threading.Barrier(2)

    def change_often(server: Engine, number: int) -> list[object]:
        outcomes: list[object] = []
        for _ in range(20):
            together.wait(timeout=30)
            try:
                with server.begin() as connection:
                    outcomes.append(change(connection, number))
            except (RequestIdTaken, VersionConflict) as refused:
                outcomes.append(refused)
        return outcomes

    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(change_often, server, n) for n, server in enumerate(servers)]
        return [outcome for done in both for outcome in done.result(timeout=60)]


def given(server: Engine, reply: str) -> None:
    with server.begin() as connection:
        interactions.append(connection, interaction(response_id=reply, user=ANN))


def test_thumbs_that_two_servers_take_at_once_leave_one_that_counts(servers):
    given(servers[0], "r")
    stored = at_once(servers, lambda c, value: feedback.submit_thumb(c, "r", value, ANN, at=1.0))
    assert len(stored) == 40
    with reading(servers[0]) as connection:
        (rated,) = feedback.list_rated(connection, DEFAULT_POLICY)
    last = max((said for said in stored if not said.duplicate), key=lambda said: said.feedback_id)
    assert (rated.feedback_id, rated.value) == (last.feedback_id, last.value)


def test_a_request_that_two_servers_get_at_once_counts_once(servers):
    given(servers[0], "r")

    def submit(connection: Connection, _number: int) -> object:
        return feedback.submit_thumb(connection, "r", 1, ANN, request_id="q", at=1.0)

    stored = at_once(servers, submit)
    assert {said.feedback_id for said in stored} == {stored[0].feedback_id}
    assert sum(not said.duplicate for said in stored) == 1


def test_an_id_that_two_servers_see_at_once_for_two_replies_is_refused_once(servers):
    given(servers[0], "r0")
    given(servers[0], "r1")

    def submit(connection: Connection, number: int) -> object:
        reply = f"r{number}"
        return feedback.submit_thumb(connection, reply, 1, ANN, request_id="q", at=1.0)

    refused = [said for said in at_once(servers, submit) if isinstance(said, RequestIdTaken)]
    assert len(refused) == 20


def test_a_preference_that_two_servers_get_at_once_counts_once(servers):
    given(servers[0], "r")

    def submit(connection: Connection, _number: int) -> object:
        said = {"request_id": "q", "at": 1.0}
        return preferences.submit_preference(connection, "r", 1, 0, ANN, **said)

    assert len({said.preference_id for said in at_once(servers, submit)}) == 1


def test_of_two_servers_that_move_the_pointer_at_once_one_is_refused(servers):
    with servers[0].begin() as connection:
        deployments.set_state(connection, DEFAULT_POLICY, 0, VersionState.CURRENT, at=1.0)

    def move(connection: Connection, _number: int) -> None:
        deployments.make_current(
            connection,
            DEFAULT_POLICY,
            1,
            expected=0,
            leaves_as=VersionState.RETIRED,
            at=2.0,
            reason="",
        )

    outcomes = at_once(servers, move)
    assert sum(not isinstance(outcome, VersionConflict) for outcome in outcomes) == 1


def test_one_trainer_learns_from_a_database_until_its_connection_is_gone(
    servers, postgresql: Cluster
):
    one, two = servers
    with only_trainer(one):
        with pytest.raises(SettingsError, match=r"state\.url: another trainer"), only_trainer(two):
            pass
        postgresql.break_connections()
        with only_trainer(two):
            pass


def test_a_database_that_was_restarted_is_used_as_before(servers, postgresql: Cluster):
    given(servers[0], "r")
    writer = GroupWriter(servers[1])
    writer.submit(lambda c: feedback.submit_thumb(c, "r", 1, ANN, at=1.0)).result(timeout=30)
    postgresql.break_connections()
    with reading(servers[0]) as connection:
        assert feedback.counts(connection)[1] == 1
    down = writer.submit(lambda c: feedback.submit_thumb(c, "r", 0, ANN, at=2.0))
    assert down.result(timeout=30).feedback_id == 2
    writer.close()


def test_what_breaks_in_the_middle_is_unavailable_and_leaves_nothing(servers, postgresql: Cluster):
    def break_off() -> None:
        with writing(servers[0]) as connection:
            deployments.set_state(connection, DEFAULT_POLICY, 0, VersionState.CURRENT, at=1.0)
            postgresql.break_connections()

    with pytest.raises(StoreUnavailable, match="cannot be written"):
        break_off()
    with reading(servers[0]) as connection:
        assert deployments.list_events(connection, DEFAULT_POLICY) == []
