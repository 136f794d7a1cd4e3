"""The command's life: it serves until it is told to stop, or until it cannot go on."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

import server.__main__ as command
from tests.fakes import FakeEngine
from tests.serving import config_of, until
from thumbloop.config import State
from thumbloop.errors import EngineUnavailable, SettingsError


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """The engines that the command starts."""
    made: list[FakeEngine] = []

    def make(model: Path, _config: object) -> FakeEngine:
        made.append(FakeEngine(model))
        return made[-1]

    monkeypatch.setattr(command, "make_engine", make)
    return made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_peace(
    tiny_model: Path,
    state: State,
    engines: list[FakeEngine],
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
):
    serving = asyncio.create_task(command.serve(config_of(tiny_model, state)))
    said: list[str] = []
    await until(lambda: said.append(capsys.readouterr().out) or "serving on port" in said[-1])
    os.kill(os.getpid(), number)
    await asyncio.wait_for(serving, 10)
    assert engines[0].is_closed
    assert "metrics on" in "".join(said)


async def test_a_signal_while_it_starts_ends_it_too(
    tiny_model: Path, state: State, engines: list[FakeEngine]
):
    serving = asyncio.create_task(command.serve(config_of(tiny_model, state)))
    await until(lambda: (state.folder / "thumbloop.db").exists())
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(serving, 20)
    assert all(engine.is_closed for engine in engines)


async def test_an_engine_that_dies_ends_it_with_the_reason(
    tiny_model: Path, state: State, engines: list[FakeEngine]
):
    serving = asyncio.create_task(command.serve(config_of(tiny_model, state)))
    await until(lambda: engines)
    engines[0].is_dead = True
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(serving, 20)
    assert engines[0].is_closed


async def test_what_keeps_it_from_starting_is_raised(
    tmp_path: Path, state: State, engines: list[FakeEngine]
):
    with pytest.raises(SettingsError, match=r"model\.path"):
        await command.serve(config_of(tmp_path / "nowhere", state))
    assert engines == []
