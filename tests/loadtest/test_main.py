"""The load generator against a whole server with a fake engine."""

import asyncio
import json
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import uvloop
from typer.testing import CliRunner

import loadtest.__main__ as main
from loadtest.swapping import NotTaken, Swapping
from loadtest.workload import Call
from tests.fakes import BASE, FakeEngine
from tests.publishing import FakeSpeaker, Publisher
from tests.serving import running
from thumbloop.client import Tls
from thumbloop.config import State, Verdict
from thumbloop.errors import Unauthenticated
from thumbloop.rendering import verdict_tokens
from thumbloop.store import open_store

MIX = {"none": 1.0, "soft_best_of_n:2": 1.0}


def load(port: int) -> main.Load:
    return main.Load(f"127.0.0.1:{port}", ("a b c",), True, MIX, 40.0, 0.5, 0)


async def test_every_call_of_a_mixture_is_answered(tiny_model: Path, tmp_path: Path):
    async with running(tiny_model, State(folder=tmp_path / "state")) as server:
        calls = await main.run(load(server.port), nullcontext())
    assert len(calls) > 5
    assert {c.status for c in calls} == {"OK"}
    assert {c.kind for c in calls} == set(MIX)
    for call in calls:
        assert call.answer is not None
        candidates = 2 if call.kind == "soft_best_of_n:2" else 1
        assert (call.answer.decoded_tokens > call.answer.reply_tokens) == (candidates == 2)


async def test_a_server_that_asks_for_a_token_is_given_one(tiny_model: Path, tmp_path: Path):
    known = {"sha256": sha256(b"secret").hexdigest(), "scopes": ["generate", "on_behalf", "admin"]}
    access = {"tokens": {"load": known}}
    state = State(folder=tmp_path / "state")
    async with running(tiny_model, state, access=access) as server:
        calls = await main.run(replace(load(server.port), token="secret"), nullcontext())
        with pytest.raises(Unauthenticated):
            await main.run(load(server.port), nullcontext())
    assert {c.status for c in calls} == {"OK"}


async def test_a_server_that_is_stuck_does_not_hang_the_load(tiny_model: Path, tmp_path: Path):
    async with running(tiny_model, State(folder=tmp_path / "state")) as server:
        server.engine.may_sample.clear()
        calls = await asyncio.wait_for(
            main.run(replace(load(server.port), deadline_s=0.3), nullcontext()), 20
        )
        server.engine.may_sample.set()
    assert len(calls) > 5
    assert {c.status for c in calls} == {"DEADLINE_EXCEEDED"}
    assert all(c.done_s - c.sent_s >= 0.29 for c in calls)


async def test_versions_are_swapped_while_the_load_runs(tiny_model: Path, tmp_path: Path):
    state = State(folder=tmp_path / "state")
    async with running(tiny_model, state) as server:
        database = open_store(state)
        verdict = verdict_tokens(Verdict(), server.engine.tokenizer)
        publisher = Publisher(
            tiny_model, state.versions, database, verdict, FakeSpeaker(FakeEngine(tiny_model))
        )
        publisher.publish(1)
        await server.serves(1)
        calls = await main.run(
            replace(load(server.port), duration_s=1.5), main.beside(state.folder, 4.0)
        )
        database.dispose()
    assert {c.status for c in calls} == {"OK"}
    assert {c.answer.policy_version for c in calls if c.answer} >= {2, 3}


async def test_a_copy_of_a_version_is_attested_like_any_other(tiny_model: Path, tmp_path: Path):
    state = State(folder=tmp_path / "state")
    async with running(tiny_model, state) as server:
        database = open_store(state)
        verdict = verdict_tokens(Verdict(), server.engine.tokenizer)
        speaker = FakeSpeaker(FakeEngine(tiny_model))
        version = Publisher(tiny_model, state.versions, database, verdict, speaker).publish(1)
        await server.serves(1)
        with Swapping(state) as swapping:
            source = state.versions / version.folder
            assert swapping.trained() == [source]
            assert await swapping.to(source) == 2
        server.engine.speaks_for["default-000003-policy"] = BASE
        with (
            Swapping(state) as swapping,
            pytest.raises(NotTaken, match=r"version 3, a copy .* rejected attestation"),
        ):
            await swapping.to(source)
        database.dispose()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mix", "nonsense"], "--mix: 'nonsense'"),
        (["--mix", "none=-1"], "a share has to be above 0"),
        (["--mix", "best_of_n:x"], "--mix: 'best_of_n:x'"),
        (["--swaps", "1"], "--swaps: needs --state"),
        (["--prompts", "/no/such/file"], "--prompts: /no/such/file cannot be read"),
        (["--cert", "/no/such/file"], "--cert and --key need each other"),
        (["--address", "127.0.0.1:9"], "no server answers at 127.0.0.1:9"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], words: str, tmp_path: Path):
    application = main.typer.Typer()
    application.command()(main.main)
    result = CliRunner().invoke(application, [*arguments, "--folder", str(tmp_path)])
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_an_empty_file_of_prompts_is_refused(tmp_path: Path):
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        main.read_prompts(tmp_path / "empty")


async def test_the_command_writes_its_report(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    async with running(tiny_model, State(folder=tmp_path / "state")) as server:
        await asyncio.to_thread(
            main.main,
            address=f"127.0.0.1:{server.port}",
            rate=20.0,
            duration=1.0,
            mix="none",
            swaps=0.0,
            state=None,
            prompts=None,
            text=True,
            seed=0,
            folder=tmp_path / "out",
        )
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["kinds"]["none"]["statuses"].keys() == {"OK"}
    assert "none: " in capsys.readouterr().out


def test_the_load_runs_on_uvloop_and_calls_as_it_was_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    seen: list[object] = []
    pem = {option: tmp_path / f"{option}.pem" for option in ("ca", "cert", "key")}
    for option, path in pem.items():
        path.write_text(option)

    async def note(given: main.Load, _meanwhile: object) -> list[Call]:
        seen.extend((type(asyncio.get_running_loop()), given.deadline_s, given.token, given.tls))
        return []

    monkeypatch.setattr(main, "run", note)
    application = main.typer.Typer()
    application.command()(main.main)
    given = ["--deadline", "2.5", "--token", "secret", "--folder", str(tmp_path)]
    for option, path in pem.items():
        given += [f"--{option}", str(path)]
    assert CliRunner().invoke(application, given).exit_code == 0
    assert seen == [uvloop.Loop, 2.5, "secret", Tls(b"ca", b"cert", b"key")]
