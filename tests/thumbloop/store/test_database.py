import multiprocessing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import InternalError, OperationalError

from thumbloop.config import State
from thumbloop.errors import SettingsError, StoreIncompatible, StoreUnavailable
from thumbloop.store import (
    database,
    deployments,
    only_trainer,
    open_store,
    reading,
    versions,
    writing,
)
from thumbloop.store.inspection import inspecting
from thumbloop.store.schema import metadata
from thumbloop.types import DEFAULT_POLICY, VersionState


def test_a_blank_store_is_migrated_and_holds_version_0_as_current(store: Engine):
    with reading(store) as connection:
        (base,) = versions.list_versions(connection, DEFAULT_POLICY)
    assert (base.version, base.parent, base.state) == (0, None, VersionState.CURRENT)
    assert base.folder == "default/000000"


def test_the_migrated_schema_is_the_declared_one(store: Engine):
    with store.begin() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


@pytest.mark.sqlite
def test_opening_a_store_again_changes_nothing(store: Engine, state: State):
    before = _dump(store)
    again = open_store(state)
    assert _dump(again) == before
    again.dispose()


def test_a_store_of_a_newer_release_is_refused_and_left_alone(store: Engine, state: State):
    with store.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreIncompatible, match="newer release"):
        open_store(state)
    with reading(store) as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


def test_a_folder_that_cannot_be_written_is_a_settings_error(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SettingsError, match=r"state\.folder.*choose a folder"):
        open_store(State(folder=tmp_path / "file"))
    with pytest.raises(SettingsError, match=r"state\.folder"):
        open_store(State(folder=tmp_path / "file" / "below"))


@pytest.mark.parametrize("name", ["what?", "a#b", "50%", "ü & co"])
def test_a_folder_may_be_called_what_means_something_in_a_url(tmp_path: Path, name: str):
    state = State(folder=tmp_path / name)
    open_store(state).dispose()
    assert state.database_file.is_file()
    with inspecting(state) as connection:
        assert [v.version for v in versions.list_versions(connection, DEFAULT_POLICY)] == [0]


def test_a_url_that_is_none_is_a_settings_error(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"state\.url"):
        open_store(State(folder=tmp_path, url="nonsense"))


def test_a_database_that_cannot_be_reached_is_unavailable(tmp_path: Path):
    with pytest.raises(StoreUnavailable, match="does not answer"):
        open_store(State(folder=tmp_path, url=f"sqlite:///{tmp_path}/missing/thumbloop.db"))


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path):
    (tmp_path / "thumbloop.db").write_text("certainly not SQLite" * 100)
    with pytest.raises(StoreUnavailable):
        open_store(State(folder=tmp_path))


@pytest.mark.sqlite
def test_commits_are_durable_and_foreign_keys_hold(store: Engine):
    with reading(store) as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA synchronous")) == 2  # FULL
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1


@pytest.mark.sqlite
def test_a_reader_sees_one_moment_and_never_blocks_the_writer(store: Engine):
    count = text("SELECT count(*) FROM events")
    with reading(store) as before:
        assert before.scalar(count) == 0
        with store.begin() as connection:
            deployments.set_state(connection, DEFAULT_POLICY, 0, VersionState.CURRENT, at=1.0)
        assert before.scalar(count) == 0
    with reading(store) as after:
        assert after.scalar(count) == 1


@pytest.mark.sqlite
def test_a_read_transaction_cannot_be_turned_into_a_write_that_lost_its_footing(store: Engine):
    """Writers take the lock when they begin, so two of them queue instead of failing."""
    store.dispose()
    with store.connect() as holder, holder.begin(), store.connect() as other:
        other.exec_driver_sql("ROLLBACK") if other.in_transaction() else None
        other.connection.driver_connection.execute("PRAGMA busy_timeout=10")
        with pytest.raises(OperationalError, match="locked"), other.begin():
            pass


@pytest.mark.sqlite
def test_a_database_that_takes_no_write_is_unavailable(
    state: State, store: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_MS", 10)
    other = open_store(state)
    locked = pytest.raises(StoreUnavailable, match="cannot be written: database is locked")
    with writing(store), locked, writing(other):
        pass
    other.dispose()


def test_a_database_that_became_read_only_is_unavailable(store: Engine):
    for opened in (reading, writing):
        with pytest.raises(StoreUnavailable, match="refused"), opened(store):
            raise refused(sqlstate="25006")


@pytest.mark.parametrize("opened", [reading, writing])
def test_a_transaction_of_ours_that_went_wrong_is_not_called_unavailable(store: Engine, opened):
    with pytest.raises(InternalError), opened(store):
        raise refused(sqlstate="25P02")


def refused(sqlstate: str) -> InternalError:
    """Return what a PostgreSQL driver raises."""
    reason = Exception("refused")
    reason.sqlstate = sqlstate
    return InternalError("INSERT", {}, reason)


def test_one_trainer_learns_from_a_database_whatever_its_state_folder(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    (tmp_path / "link.db").symlink_to(tmp_path / "shared.db")
    one = open_store(State(folder=tmp_path / "one", url=url))
    two = open_store(State(folder=tmp_path / "two", url=url.replace("shared", "link")))
    with only_trainer(one):  # noqa: SIM117
        with pytest.raises(SettingsError, match=r"state\.url: another trainer"), only_trainer(two):
            pass
    with only_trainer(two):
        pass
    for store in (one, two):
        store.dispose()


def test_a_trainer_takes_its_lock_while_somebody_writes(
    state: State, store: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_MS", 10)
    other = open_store(state)
    with writing(store), only_trainer(other):
        pass
    other.dispose()


def test_a_write_that_fails_leaves_nothing(store: Engine):
    def fail() -> None:
        with writing(store) as connection:
            deployments.set_state(connection, DEFAULT_POLICY, 0, VersionState.CURRENT, at=1.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with reading(store) as connection:
        assert deployments.list_events(connection, DEFAULT_POLICY) == []


def test_many_processes_may_open_a_blank_store_at_once(state: State):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        tables = pool.map(_open_and_list, [state.folder] * 4)
    assert len(set(tables)) == 1
    assert "thumbs" in tables[0]


def _open_and_list(folder: Path) -> tuple[str, ...]:
    engine = open_store(State(folder=folder))
    names = tuple(sorted(inspect(engine).get_table_names()))
    engine.dispose()
    return names


def _dump(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.connection.driver_connection.iterdump())
