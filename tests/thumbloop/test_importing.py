"""`thumbloop import`, against a server in this process."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.serving import Running, running
from thumbloop import cli, importing
from thumbloop.config import State
from thumbloop.store import feedback, preferences, reading
from thumbloop.types import DEFAULT_POLICY, ComparedReply, RatedReply, User

Command = Callable[..., Awaitable[Result]]
TURNS = [{"role": "user", "content": "how was it"}]


def kto(number: int = 0, **changes: object) -> dict[str, Any]:
    return {"prompt": "the film was", "completion": f"good {number}", "label": True} | changes


def dpo(**changes: object) -> dict[str, Any]:
    return {"prompt": TURNS, "chosen": "good", "rejected": "bad"} | changes


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(folder=tmp_path / "state")


@pytest.fixture
async def server(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    async with running(tiny_model, state) as server:
        yield server


async def run(*arguments: object) -> Result:
    """Run the command in a thread, as the server needs this one."""
    return await asyncio.to_thread(CliRunner().invoke, cli.app, [str(a) for a in arguments])


@pytest.fixture
def bring_in(server: Running) -> Command:
    async def bring_in(*arguments: object) -> Result:
        return await run("import", *arguments, "--address", f"127.0.0.1:{server.port}")

    return bring_in


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rated(server: Running) -> list[RatedReply]:
    assert server.database is not None
    with reading(server.database) as connection:
        return feedback.list_rated(connection, DEFAULT_POLICY)


def compared(server: Running) -> list[ComparedReply]:
    assert server.database is not None
    with reading(server.database) as connection:
        return preferences.list_compared(connection, DEFAULT_POLICY)


async def test_a_file_is_brought_in_once(server: Running, bring_in: Command, tmp_path: Path):
    path = write(tmp_path / "data.jsonl", kto(1), kto(2, label=False), dpo())
    done = await bring_in(path, "--user", "before")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "imported 3, there already 0, refused 0\n"
    done = await bring_in(path, "--user", "before")
    assert done.stdout == "imported 0, there already 3, refused 0\n"
    assert [(r.candidate.text, r.value, r.user.user_id) for r in rated(server)] == [
        ("good 1", 1, "before"),
        ("good 2", 0, "before"),
    ]
    assert [(r.better.text, r.worse.text) for r in compared(server)] == [("good", "bad")]


async def test_a_line_that_is_wrong_is_named_and_the_others_come_in(
    server: Running, bring_in: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importing, "_MOST_ITEMS", 2)
    path = write(tmp_path / "data.jsonl", kto(1), kto(2, label="yes"), kto(3, completion=" "))
    with path.open("a") as file:
        file.write("{\n" + json.dumps(kto(5)) + "\n" + json.dumps(kto(6)) + "\n")
    done = await bring_in(path)
    assert done.exit_code == 1
    assert done.stdout == "imported 3, there already 0, refused 3\n"
    lines = done.stderr.splitlines()
    assert lines[0] == "data.jsonl:2: label: has to be true or false"
    assert lines[1] == "data.jsonl:3: thumb.reply: is empty"
    assert lines[2].startswith("data.jsonl:4: is no JSON: ")
    assert [r.candidate.text for r in rated(server)] == ["good 1", "good 5", "good 6"]


async def test_what_left_one_store_comes_into_another(
    server: Running, bring_in: Command, tmp_path: Path, tiny_model: Path, state: State
):
    for number in range(3):
        reply = await server.client.generate("hello", user_id=f"user {number}")
        await server.client.rate(reply.response_id, up=number != 1, user_id=f"user {number}")
    before = rated(server)
    for name in ("data.jsonl", "data.parquet"):
        done = await run("export", "kto", tmp_path / name, "--origin", "--state", state.folder)
        assert done.exit_code == 0, done.output
        # It is there already: nobody's word counts twice.
        done = await bring_in(tmp_path / name)
        assert done.stdout == "imported 0, there already 3, refused 0\n"
    async with running(tiny_model, State(folder=tmp_path / "another")) as another:
        address = ("--address", f"127.0.0.1:{another.port}")
        done = await run("import", tmp_path / "data.parquet", *address)
        assert done.stdout == "imported 3, there already 0, refused 0\n"
        done = await run("import", tmp_path / "data.jsonl", *address)
        assert done.stdout == "imported 0, there already 3, refused 0\n"
        after = rated(another)
    for old, new in zip(before, after, strict=True):
        assert new.prompt_token_ids == old.prompt_token_ids
        assert (new.candidate.text, new.value) == (old.candidate.text, old.value)
        assert new.user == old.user
        assert new.created_at == pytest.approx(old.created_at, abs=1e-5)


async def test_langfuses_scores_come_in_beside_their_traces(
    server: Running, bring_in: Command, tmp_path: Path
):
    score = {"id": "s", "trace_id": "t", "name": "user-feedback", "value": 1, "comment": "lovely"}
    other = score | {"id": "s-2", "name": "stars", "value": 2}
    scores = write(tmp_path / "scores.jsonl", score, other, score | {"id": "s-3", "trace_id": "u"})
    trace = {"id": "t", "user_id": "ann", "input": TURNS, "output": "good"}
    traces = write(tmp_path / "traces.jsonl", {"id": "x"}, trace)
    done = await bring_in(scores, "--traces", traces)
    assert (done.exit_code, done.stdout) == (1, "imported 1, there already 0, refused 1\n")
    assert done.stderr == "scores.jsonl:3: there is no trace u with an output\n"
    done = await bring_in(scores, "--traces", traces, "--score", "stars", "--up-from", "3")
    assert (done.exit_code, done.stdout) == (0, "imported 1, there already 0, refused 0\n")
    assert [(r.candidate.text, r.value, r.user) for r in rated(server)] == [
        ("good", 1, User("", "ann")),
        ("good", 0, User("", "ann")),
    ]
    done = await bring_in(scores, "--traces", traces, "--score", "moons")
    assert done.stderr == "no score is called moons; --score says which ones are thumbs\n"


async def test_a_mere_string_means_what_the_operator_says(
    server: Running, bring_in: Command, tmp_path: Path
):
    path = write(tmp_path / "data.jsonl", kto())
    assert (await bring_in(path, "--plain", "chat", "--subject", "backend")).exit_code == 0
    (found,) = rated(server)
    chat = await server.client.generate("the film was")
    assert found.prompt_token_ids == server.stored(chat.response_id).prompt_token_ids
    assert found.user == User("backend", "")


@pytest.mark.parametrize("most_bytes", [1, 300])
async def test_a_call_holds_no_more_than_a_server_takes(
    server: Running,
    bring_in: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most_bytes: int,
):
    monkeypatch.setattr(importing, "_MOST_BYTES", most_bytes)
    monkeypatch.setattr(importing, "_LARGEST", 200)
    path = write(tmp_path / "data.jsonl", kto(1), kto(2, completion="x" * 300), kto(3))
    done = await bring_in(path)
    assert done.stdout == "imported 2, there already 0, refused 1\n"
    assert done.stderr.startswith("data.jsonl:2: is longer than")


async def test_what_cannot_be_brought_in_at_all_is_said_in_one_line(
    bring_in: Command, tmp_path: Path
):
    scores = write(tmp_path / "scores.jsonl", {"trace_id": "t", "name": "n", "value": 1})
    for path, said in (
        (tmp_path / "nowhere.jsonl", "cannot be read: No such file or directory"),
        (tmp_path / "data.csv", "has to end with .jsonl or .parquet"),
        (scores, "name what they are about with --traces"),
    ):
        done = await bring_in(path)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith("error: ")
        assert said in done.stderr


async def test_an_empty_file_is_nothing(bring_in: Command, tmp_path: Path):
    done = await bring_in(write(tmp_path / "data.jsonl"))
    assert (done.exit_code, done.stdout) == (0, "imported 0, there already 0, refused 0\n")
