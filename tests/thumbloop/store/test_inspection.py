"""A store is read as it is, and by no means changed."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from thumbloop.config import State
from thumbloop.errors import SettingsError, StoreUnavailable
from thumbloop.store import inspection, open_store

WRITE = text("UPDATE alembic_version SET version_num = 'x'")


@pytest.fixture
def state(tmp_path: Path) -> State:
    state = State(folder=tmp_path / "folder #1")
    open_store(state).dispose()
    return state


def test_what_is_there_is_read(state: State):
    newest, *older = inspection.known_levels()
    assert newest > max(older)
    with inspection.inspecting(state) as connection:
        assert inspection.level(connection) == newest
        assert inspection.newest_row_at(connection) is None


@pytest.mark.parametrize("is_in_use", [False, True])
def test_nothing_can_be_written(state: State, is_in_use: bool):
    with closing(sqlite3.connect(state.database_file)) as other:
        if is_in_use:
            other.execute("SELECT * FROM alembic_version").fetchall()  # makes the log
        with pytest.raises(StoreUnavailable, match="readonly"):  # noqa: SIM117
            with inspection.inspecting(state) as connection:
                connection.execute(WRITE)


def test_what_was_written_a_moment_ago_is_read(state: State):
    with closing(sqlite3.connect(state.database_file)) as other:
        with other:
            other.execute(
                "INSERT INTO events (at, kind, policy, actor, detail) VALUES (7, 'x', 'x', 'x', '{}')"
            )
        with inspection.inspecting(state) as connection:
            assert inspection.newest_row_at(connection) == 7


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path):
    state = State(folder=tmp_path / "state")
    with pytest.raises(SettingsError, match="there is no database"):  # noqa: SIM117
        with inspection.inspecting(state):
            pass
    assert not state.folder.exists()


def test_a_url_that_leads_nowhere_is_told(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"state\.url"):  # noqa: SIM117
        with inspection.inspecting(State(folder=tmp_path, url="nonsense")):
            pass
