"""`thumbloop export`, on a store that no server has open."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import Engine
from typer.testing import CliRunner

from tests.rows import ANN, BOB, interaction, rated
from thumbloop import cli, exporting
from thumbloop.config import State
from thumbloop.exchange import files
from thumbloop.store import erasure, feedback, interactions, open_store, preferences
from thumbloop.types import DEFAULT_POLICY, IMPORTED_VERSION, Learning, Message, Prompt, Role

CHAT = Prompt(messages=(Message(Role.USER, "How?"),))


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(folder=tmp_path / "state")


@pytest.fixture
def store(state: State):
    engine = open_store(state)
    yield engine
    engine.dispose()


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli.app, ["export", *map(str, arguments)])


def records(path: Path) -> list[Any]:
    return [line.record for line in files.read(path)]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_thumbs_preferences_and_rollouts_leave(
    store: Engine, state: State, tmp_path: Path, name: str
):
    with store.begin() as connection:
        reply, _ = rated(connection, 1, prompt=CHAT)
        preferences.submit_preference(connection, reply, 1, 0, ANN, at=1.0)
    where = ("--state", state.folder)
    for shape, columns in (
        ("kto", {"prompt", "completion", "label"}),
        ("dpo", {"prompt", "chosen", "rejected"}),
    ):
        done = run(shape, tmp_path / f"{shape}-{name}", *where)
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout == f"1 records in {tmp_path}/{shape}-{name}\n"
        (record,) = records(tmp_path / f"{shape}-{name}")
        assert record.keys() == columns
        assert record["prompt"] == [{"role": "user", "content": "How?"}]
    assert run("rollouts", tmp_path / name, *where).exit_code == 0
    (record,) = records(tmp_path / name)
    assert len(record["candidates"]) == 2


def test_what_leaves_may_be_chosen(store: Engine, state: State, tmp_path: Path):
    with store.begin() as connection:
        for number, at in enumerate((1e9, 1.1e9, 1.2e9, 1.3e9)):
            prompt = CHAT if number == 3 else Prompt(text="a")
            reply = interaction(policy_version=number, prompt=prompt)
            interactions.append(connection, reply)
            feedback.submit_thumb(connection, reply.response_id, 1, ANN, at=at)
    path = tmp_path / "out.jsonl"

    def versions(*options: str) -> list[int]:
        done = run("kto", path, "--state", state.folder, "--origin", "--force", *options)
        assert done.exit_code == 0, done.output
        return [record["policy_version"] for record in records(path)]

    assert versions("--prompts", "text") == [0, 1, 2]
    assert versions("--prompts", "chat") == [3]
    assert versions("--policy-version", "1") == [1]
    # 2001-09-09T01:46:40 is 1e9, 2004-11-09T11:33:20 is 1.1e9.
    assert versions("--until", "2001-09-10") == [0]
    assert versions("--until", "2001-09-09T01:46:40") == []
    assert versions("--since", "2001-09-09T01:46:41Z", "--until", "2004-11-10") == [1]
    assert versions("--since", "2004-11-09T12:33:20+0100", "--policy-version", "1") == [1]


def test_what_was_imported_leaves_with_the_rest(store: Engine, state: State, tmp_path: Path):
    with store.begin() as connection:
        rated(connection, 1, policy_version=IMPORTED_VERSION)
    assert run("kto", tmp_path / "out.jsonl", "--state", state.folder).exit_code == 0
    assert len(records(tmp_path / "out.jsonl")) == 1


def test_nothing_is_a_file_without_records(store: Engine, state: State, tmp_path: Path):
    with store.begin() as connection:
        rated(connection, 1, learning=Learning.EXCLUDED)
    done = run("kto", tmp_path / "out.jsonl", "--state", state.folder)
    assert (done.exit_code, done.stdout) == (0, f"0 records in {tmp_path}/out.jsonl\n")
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_who_is_forgotten_while_the_file_is_written_is_not_in_it(
    store: Engine, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with store.begin() as connection:
        rated(connection, 1, user=ANN)
        rated(connection, 1, user=BOB)
    write, times = exporting.write, []

    def forget_meanwhile(*arguments: Any) -> int:
        count = write(*arguments)
        times.append(count)
        if len(times) == 1:
            with store.begin() as connection:
                erasure.erase(connection, DEFAULT_POLICY, BOB, at=1.0, actor="operator")
        return count

    monkeypatch.setattr(exporting, "write", forget_meanwhile)
    done = run("kto", tmp_path / "out.jsonl", "--state", state.folder, "--origin")
    assert done.exit_code == 0, done.output
    assert times == [2, 1]
    assert [record["user_id"] for record in records(tmp_path / "out.jsonl")] == ["ann"]


def test_where_users_are_forgotten_all_the_time_nothing_is_left(
    store: Engine, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    numbers = iter(range(100))
    monkeypatch.setattr(exporting, "_latest_erasure", lambda _store: next(numbers))
    done = run("kto", tmp_path / "out.jsonl", "--state", state.folder)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "users are being forgotten all the time" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_the_state_may_be_that_of_the_servers_settings(store: Engine, state: State, tmp_path: Path):
    settings = tmp_path / "server.yaml"
    settings.write_text(json.dumps({"state": {"folder": str(state.folder)}}))
    assert run("kto", tmp_path / "1.jsonl", "--config", settings).exit_code == 0
    named = {"THUMBLOOP_SERVER_STATE__FOLDER": str(state.folder)}
    assert run("kto", tmp_path / "2.jsonl", **named).exit_code == 0
    url = f"sqlite:///{state.database_file}"
    other = tmp_path / "other"
    other.mkdir()
    done = run("kto", tmp_path / "3.jsonl", "--state", other, "--url", url)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("database", [None, b"certainly not SQLite" * 100])
def test_where_there_is_no_store_none_is_made(tmp_path: Path, database: bytes | None):
    folder = tmp_path / "state"
    if database is not None:
        folder.mkdir()
        (folder / "thumbloop.db").write_bytes(database)
    done = run("kto", tmp_path / "out.jsonl", "--state", folder)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: state")
    assert folder.exists() is (database is not None)
    assert not (tmp_path / "out.jsonl").exists()


def test_an_empty_folder_is_no_store(tmp_path: Path):
    done = run("kto", tmp_path / "out.jsonl", "--state", tmp_path)
    assert done.exit_code == 1
    assert "there is no store in" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_is_said_in_one_line(store: Engine, state: State, tmp_path: Path):
    where = ("--state", state.folder)
    (tmp_path / "there.jsonl").touch()
    with store.begin() as connection:
        rated(connection, 1)
        rated(connection, 1, prompt=CHAT)
    for name, said in (
        ("out.csv", "has to end with .jsonl or .parquet"),
        ("there.jsonl", "is there already; --force replaces it"),
        ("nowhere/out.jsonl", "cannot be written: No such file or directory"),
        ("out.jsonl", "say --prompts text or --prompts chat"),
    ):
        done = run("kto", tmp_path / name, *where)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1), name
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "there.jsonl"]
