"""The end of a round when disk, database or another trainer come between."""

import shutil
import sqlite3
from contextlib import contextmanager

import pytest
from sqlalchemy.exc import OperationalError

from tests.bench import Bench
from tests.full_disk import full_disk
from tests.rows import finished_round, version
from thumbloop import artifacts
from thumbloop.store import database, versions
from trainer import publishing


def folders(bench: Bench) -> list[str]:
    return sorted(p.name for p in (bench.config.state.versions / "default").iterdir())


def verify(bench: Bench, number: int) -> None:
    row = bench.get(number)
    artifacts.verify(bench.config.state.versions / row.folder, row.manifest_digest, bench.base)


def digests(bench: Bench, number: int) -> dict[str, str]:
    folder = bench.config.state.versions / bench.get(number).folder
    return artifacts.read_manifest(folder).files


def count_of(bench: Bench, outcome: str) -> float | None:
    name = "thumbloop_trainer_rounds_total"
    return bench.metrics.registry.get_sample_value(name, {"outcome": outcome})


@pytest.fixture
def meanwhile(monkeypatch):
    """Let something happen while a version is written: after its files, before its row."""

    def meanwhile(happens):
        describe = publishing.describe

        def interrupted(*arguments):
            manifest = describe(*arguments)
            happens()
            return manifest

        monkeypatch.setattr(publishing, "describe", interrupted)

    return meanwhile


@pytest.mark.parametrize("most_bytes", [0, 100, 10_000])
def test_a_disk_too_full_for_the_version_drops_the_round_and_the_next_try_publishes(
    bench, most_bytes
):
    bench.rate(40)
    with full_disk(most_bytes):
        assert not bench.loop.step()
    assert "dropped, as the version cannot be written: " in bench.lines[-1]
    assert "nothing is lost, its feedback stays new; trying again in 0.01 s" in bench.lines[-1]
    assert (folders(bench), bench.rounds(), bench.new_feedback(0)) == (["000000"], [], 40)
    assert count_of(bench, "failed") == 1
    assert bench.loop.step()
    assert (bench.versions(), folders(bench)) == ([0, 1], ["000000", "000001"])
    verify(bench, 1)


def test_a_disk_too_full_for_the_database_drops_the_round_and_leaves_no_folder_for_long(bench):
    bench.rate(40)
    database_file = bench.config.state.folder / "thumbloop.db-wal"
    with full_disk(database_file.stat().st_size):
        assert not bench.loop.step()
        assert "dropped, as the store cannot be written: disk I/O error" in bench.lines[-1]
        assert (folders(bench), bench.rounds()) == (["000000", "000001"], [])
        assert not bench.loop.step()
    assert (folders(bench), bench.new_feedback(0)) == (["000000", "000001"], 40)
    assert bench.loop.step()
    assert (bench.versions(), folders(bench)) == ([0, 1], ["000000", "000001"])
    verify(bench, 1)


def test_a_round_that_was_dropped_learns_the_same_again(tmp_path, tiny_model):
    found = []
    for name, most_bytes in (("dropped", 100), ("not", 2**40)):
        (tmp_path / name).mkdir()
        bench = Bench(tmp_path / name, tiny_model)
        bench.rate(40)
        with full_disk(most_bytes):
            bench.loop.step()
        bench.loop.step()
        found.append((digests(bench, 1), bench.get(1).metrics))
        bench.engine.dispose()
    assert found[0] == found[1]


@contextmanager
def locked(bench):
    """Hold the database's write lock, as a backup that went wrong would."""
    other = sqlite3.connect(bench.config.state.folder / "thumbloop.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.close()


def test_a_locked_database_drops_the_round_and_the_next_try_publishes(
    tmp_path, tiny_model, monkeypatch
):
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_MS", 20)
    bench = Bench(tmp_path, tiny_model)
    bench.rate(40)
    with locked(bench):
        assert not bench.loop.step()
        assert "dropped, as the store cannot be written: database is locked" in bench.lines[-1]
        assert (folders(bench), bench.rounds()) == (["000000"], [])
    assert bench.loop.step()
    verify(bench, 1)
    bench.engine.dispose()


def test_a_blocked_round_too_waits_for_the_database(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_MS", 20)
    bench = Bench(tmp_path, tiny_model)
    bench.rate(40, shuffled=True)
    with locked(bench):
        assert not bench.loop.step()
    assert (bench.rounds(), count_of(bench, "failed")) == ([], 1)
    assert bench.loop.step()
    assert len(bench.rounds()) == 1
    bench.engine.dispose()


def test_a_commit_whose_answer_is_lost_is_found_done(bench, meanwhile, monkeypatch):
    dialect = bench.engine.dialect
    commit = dialect.do_commit

    def commit_and_lose_the_answer(connection):
        commit(connection)
        monkeypatch.setattr(dialect, "do_commit", commit)
        raise OperationalError("COMMIT", None, Exception("connection lost"))

    meanwhile(lambda: monkeypatch.setattr(dialect, "do_commit", commit_and_lose_the_answer))
    bench.rate(40)
    assert not bench.loop.step()
    assert "the store cannot be written: connection lost" in bench.lines[-1]
    verify(bench, 1)
    assert not bench.loop.step()
    assert bench.lines[-1] == "waiting for the server to try version 1"
    assert len(bench.rounds()) == 1


def test_another_trainers_version_supersedes_the_round(bench, meanwhile):
    """Only against all locks: what the other one published stays as it is, and this one says so."""

    def another_publishes():
        with bench.engine.begin() as connection:
            versions.finish_round(connection, finished_round(1), version(1))

    meanwhile(another_publishes)
    bench.rate(40)
    assert bench.loop.step()
    assert "published nothing: another trainer published version 1 meanwhile" in bench.lines[-1]
    assert bench.get(1).round_id == "round-1"
    assert bench.rounds()[-1]["reason"].startswith("superseded: another trainer ")
    assert (bench.rounds()[-1]["version"], folders(bench)) == (None, ["000000"])
    assert count_of(bench, "superseded") == 1


def test_another_trainers_folder_is_neither_replaced_nor_removed(bench, meanwhile):
    theirs = bench.config.state.versions / "default" / "000001"

    def another_publishes():
        theirs.mkdir()
        (theirs / artifacts.MANIFEST).write_text("theirs")
        with bench.engine.begin() as connection:
            versions.finish_round(connection, finished_round(1), version(1))

    meanwhile(another_publishes)
    bench.rate(40)
    assert not bench.loop.step()
    assert "dropped, as the version cannot be written: " in bench.lines[-1]
    assert (theirs / artifacts.MANIFEST).read_text() == "theirs"
    assert not bench.loop.step()
    assert bench.lines[-1] == "waiting for the server to try version 1"
    assert folders(bench) == ["000000", "000001"]


def test_no_row_ever_names_a_folder_that_is_gone(bench, monkeypatch):
    write_version = artifacts.write_version

    def written_and_removed(*arguments):
        written = write_version(*arguments)
        shutil.rmtree(bench.config.state.versions / written.folder)
        return written

    monkeypatch.setattr(publishing, "write_version", written_and_removed)
    bench.rate(40)
    assert not bench.loop.step()
    assert (
        "dropped, as the version that was written is no longer as it was: manifest_missing"
        in bench.lines[-1]
    )
    assert (bench.versions(), bench.rounds()) == ([0], [])
