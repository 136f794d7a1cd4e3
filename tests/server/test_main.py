"""The command's life: it serves until it is told to stop, or until it cannot go on."""

import asyncio
import os
import re
import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import server.__main__ as command
from server.grpc_port import SERVICES
from tests.fakes import FakeEngine
from tests.refusals import refused
from tests.serving import config_of, until
from thumbloop.config import State
from thumbloop.errors import EngineUnavailable, SettingsError
from thumbloop.store import interactions, open_store, reading
from thumbloop.types import DEFAULT_POLICY
from thumbloop.v1 import policy_pb2
from thumbloop.v1.policy_pb2_grpc import PolicyServiceStub

CALLS = 20
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """The engines that the command starts."""
    made: list[FakeEngine] = []

    def make(model: Path, _config: object) -> FakeEngine:
        made.append(FakeEngine(model))
        return made[-1]

    monkeypatch.setattr(command, "make_engine", make)
    return made


async def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """Wait until the command serves; return what it has printed."""
    said: list[str] = []
    await until(lambda: said.append(capsys.readouterr().out) or "serving on port" in said[-1])
    return "".join(said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_peace(
    tiny_model: Path,
    state: State,
    engines: list[FakeEngine],
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
):
    serving = asyncio.create_task(command.serve(config_of(tiny_model, state)))
    said = await printed(capsys)
    os.kill(os.getpid(), number)
    await asyncio.wait_for(serving, 10)
    assert engines[0].is_closed
    assert "metrics on" in said


async def test_a_signal_under_load_lets_calls_finish_and_turns_late_ones_away(
    tiny_model: Path,
    state: State,
    engines: list[FakeEngine],
    capsys: pytest.CaptureFixture[str],
):
    hello = policy_pb2.GenerateRequest(
        text="hello", guidance=policy_pb2.GuidanceParams(num_candidates=1)
    )
    serving = asyncio.create_task(command.serve(config_of(tiny_model, state)))
    found = re.search(r"serving on port (\d+)", await printed(capsys))
    (engine,) = engines
    engine.may_sample.clear()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{found[1]}") as channel:
        policy, health = PolicyServiceStub(channel), health_pb2_grpc.HealthStub(channel)

        async def stream() -> policy_pb2.GenerateResponse:
            request = policy_pb2.StreamGenerateRequest(request=hello)
            *_, last = [event async for event in policy.StreamGenerate(request)]
            return last.response

        calls = [policy.Generate(hello) for _ in range(CALLS)]
        calls += [asyncio.create_task(stream()) for _ in range(CALLS)]
        await until(lambda: engine.started == len(calls))
        os.kill(os.getpid(), signal.SIGTERM)
        last_told = health_pb2.HealthCheckRequest(service=SERVICES[-1])
        async with asyncio.timeout(10):
            while (await health.Check(last_told)).status == SERVING:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        for late in (policy.Generate(hello), stream()):
            assert (await refused(late)).code() is grpc.StatusCode.UNAVAILABLE
        assert not serving.done()
        engine.may_sample.set()
        replies = {reply.response_id for reply in await asyncio.gather(*calls)}
        await asyncio.wait_for(serving, 10)
    assert len(replies) == len(calls)
    assert (engine.aborted, engine.is_closed) == (0, True)
    database = open_store(state)
    with reading(database) as connection:
        rows = interactions.list_since(connection, DEFAULT_POLICY, 0)
    database.dispose()
    assert {row.response_id for row in rows} == replies


async def test_a_signal_while_it_starts_ends_it_too(
    tiny_model: Path, state: State, engines: list[FakeEngine]
):
    state.database_file.unlink()
    serving = asyncio.create_task(command.serve(config_of(tiny_model, state)))
    await until(state.database_file.exists)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(serving, 20)
    assert all(engine.is_closed for engine in engines)


async def test_an_engine_that_dies_ends_it_with_the_reason(
    tiny_model: Path, state: State, engines: list[FakeEngine]
):
    config = config_of(tiny_model, state, engine={"max_restarts_per_hour": 0})
    serving = asyncio.create_task(command.serve(config))
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
