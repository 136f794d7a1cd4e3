"""The life of a whole server: ports, starting, serving, draining, dying."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.application import Application
from server.grpc_port import SERVICES
from server.health import LIVENESS
from server.lifecycle import Phase
from tests.fakes import FakeEngine
from tests.refusals import refused
from tests.serving import Running, config_of, health, running, until
from thumbloop.config import Model, State
from thumbloop.config.shared import Metrics
from thumbloop.errors import SettingsError
from thumbloop.v1 import policy_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
HELLO = policy_pb2.GenerateRequest(text="hello", user_id="ann")


async def test_health_says_serving_for_the_server_and_every_service(server: Running):
    assert [await health(server, name) for name in ("", *SERVICES)] == [SERVING] * 4


async def test_it_is_alive_before_it_serves(tiny_model: Path, state: State):
    ready = threading.Event()

    def slow(model: Path, _config: object) -> FakeEngine:
        ready.wait(20)
        return FakeEngine(model)

    application = Application(config_of(tiny_model, state, listen={"health_port": 0}), slow)
    starting = asyncio.create_task(application.start())
    try:
        await until(lambda: application.health_port)
        for port in (application.port, application.health_port):
            assert [await health(port, name) for name in (LIVENESS, "")] == [SERVING, NOT_SERVING]
        ready.set()
        await starting
        for port in (application.port, application.health_port):
            assert [await health(port, name) for name in (LIVENESS, "")] == [SERVING, SERVING]
    finally:
        ready.set()
        await application.stop()


async def test_it_is_alive_until_the_last_call_has_left(tiny_model: Path, state: State):
    async with running(tiny_model, state, listen={"health_port": 0}) as server:
        server.engine.may_sample.clear()
        call = asyncio.create_task(server.generate("hello"))
        await server.sampling(4)
        stopping = asyncio.create_task(server.application.stop())
        await asyncio.sleep(0.05)
        port = server.application.health_port
        assert [await health(port, name) for name in (LIVENESS, "")] == [SERVING, NOT_SERVING]
        server.engine.may_sample.set()
        await call
        await stopping


async def test_a_port_for_probes_that_is_taken_is_named(tiny_model: Path, state: State):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        listen = {"health_port": other.getsockname()[1]}
        with pytest.raises(SettingsError, match=r"listen\.health_port: .* cannot be bound"):
            async with running(tiny_model, state, listen=listen):
                pass


async def test_reflection_lists_the_services(server: Running):
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request])):
        names = {s.name for s in answer.list_services_response.service}
    assert names == {
        *SERVICES,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_until_the_engine_is_ready_health_says_so_and_calls_are_unavailable(
    tiny_model: Path, state: State
):
    ready = threading.Event()

    def slow(model: Path, _config: object) -> FakeEngine:
        ready.wait(20)
        return FakeEngine(model)

    application = Application(config_of(tiny_model, state), slow)
    starting = asyncio.create_task(application.start())
    await until(lambda: application.port)
    server = Running(application, None)
    try:
        assert await health(server) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await server.policy.Generate(HELLO, wait_for_ready=True)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "starting" in raised.value.details()
        ready.set()
        await starting
        assert await health(server) == SERVING
        assert (await server.policy.Generate(HELLO)).text
    finally:
        ready.set()
        await server.close()
        await application.stop()


async def test_stopping_lets_calls_finish_and_turns_late_ones_away(tiny_model: Path, state: State):
    async with running(tiny_model, state) as server:
        server.engine.may_sample.clear()
        call = asyncio.create_task(server.generate("hello"))
        await server.sampling(4)
        stopping = asyncio.create_task(server.application.stop())
        await asyncio.sleep(0.05)
        assert await health(server) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await server.generate("too late")
        assert late.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in late.value.details()
        assert not stopping.done()
        server.engine.may_sample.set()
        reply = await call
        await stopping
        assert server.engine.is_closed
        assert server.stored(reply.response_id).chosen.text == reply.text


async def test_under_load_all_that_came_in_time_is_answered_and_the_rest_turned_away(
    tiny_model: Path, state: State
):
    """Calls of both kinds and over both ports, those included that wait for their turn."""
    limits = {"max_candidates": 4, "max_candidates_in_flight": 16, "max_queued_candidates": 1000}
    body = {"prompt": "hello", "model": "default"}

    async def stream(server: Running) -> str:
        call = server.policy.StreamGenerate(policy_pb2.StreamGenerateRequest(request=HELLO))
        *deltas, last = [event async for event in call]
        assert "".join(event.text_delta for event in deltas) == last.response.text
        return last.response.response_id

    async with running(tiny_model, state, limits=limits) as server:
        server.engine.may_sample.clear()
        url = f"http://127.0.0.1:{server.application.http_port}/v1/completions"
        async with httpx2.AsyncClient(timeout=30) as http:
            calls = [server.policy.Generate(HELLO) for _ in range(20)]
            streams = [asyncio.create_task(stream(server)) for _ in range(20)]
            posts = [asyncio.create_task(http.post(url, json=body)) for _ in range(20)]
            lines = [
                asyncio.create_task(http.post(url, json=body | {"stream": True})) for _ in range(20)
            ]
            await until(lambda: server.application._lifecycle.in_flight == 80)
            assert server.application._admission.candidates == 16
            stopping = asyncio.create_task(server.application.stop())
            await until(lambda: server.application._lifecycle.phase is Phase.DRAINING)
            for late in (server.policy.Generate(HELLO), stream(server)):
                refusal = await refused(late)
                assert refusal.code() is grpc.StatusCode.UNAVAILABLE
                assert "shutting down" in refusal.details()
            for change in ({}, {"stream": True}):
                assert (await http.post(url, json=body | change)).status_code == 503
            await asyncio.sleep(1.5)  # longer than connections get once all calls have ended
            assert not stopping.done()
            server.engine.may_sample.set()
            replies = [reply.response_id for reply in await asyncio.gather(*calls)]
            replies += await asyncio.gather(*streams)
            answers = await asyncio.gather(*posts)
            assert [answer.status_code for answer in answers] == [200] * 20
            replies += [answer.json()["id"] for answer in answers]
            for answer in await asyncio.gather(*lines):
                assert answer.status_code == 200
                assert answer.text.endswith("data: [DONE]\n\n")
                assert "error" not in answer.text
                replies.append(json.loads(answer.text.split("\n")[0].removeprefix("data: "))["id"])
            await asyncio.wait_for(stopping, 10)
        assert len(set(replies)) == 80
        assert all(server.stored(reply).chosen for reply in replies)
        assert server.engine.aborted == 0


async def test_a_thumb_is_taken_while_the_server_drains(tiny_model: Path, state: State):
    async with running(tiny_model, state) as server:
        reply = await server.generate("hello")
        server.engine.may_sample.clear()
        call = asyncio.create_task(server.generate("slow"))
        await server.sampling(4)
        stopping = asyncio.create_task(server.application.stop())
        await asyncio.sleep(0.05)
        assert (await server.client.rate(reply.response_id, up=True)).feedback_id == 1
        server.engine.may_sample.set()
        await call
        await stopping


async def test_a_call_that_outlasts_the_grace_period_is_cut_off(tiny_model: Path, state: State):
    async with running(tiny_model, state, listen={"grace_s": 0.05}) as server:
        server.engine.may_sample.clear()
        call = asyncio.create_task(server.generate("endless"))
        await server.sampling(4)
        started = time.monotonic()
        await server.application.stop()
        assert time.monotonic() - started < 5
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        assert raised.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert server.engine.aborted == 4


async def test_an_engine_that_was_still_starting_is_closed_all_the_same(
    tiny_model: Path, state: State
):
    engines: list[FakeEngine] = []
    entered, ready = threading.Event(), threading.Event()

    def slow(model: Path, _config: object) -> FakeEngine:
        entered.set()
        ready.wait(20)
        engines.append(FakeEngine(model))
        return engines[0]

    application = Application(config_of(tiny_model, state), slow)
    starting = asyncio.create_task(application.start())
    await asyncio.to_thread(entered.wait, 20)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    asyncio.get_running_loop().call_later(0.05, ready.set)
    await application.stop()
    assert engines[0].is_closed


async def test_stopping_twice_or_before_the_start_is_harmless(tiny_model: Path, state: State):
    application = Application(config_of(tiny_model, state), lambda m, _c: FakeEngine(m))
    await application.stop()
    async with running(tiny_model, state) as server:
        await server.application.stop()
        await server.application.stop()


async def start_and_stop(config: object) -> None:
    application = Application(config, lambda m, _c: FakeEngine(m))  # type: ignore[arg-type]
    try:
        await application.start()
    finally:
        await application.stop()


@pytest.fixture
def taken_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


async def test_a_grpc_port_in_use_is_a_settings_error(
    tiny_model: Path, state: State, taken_port: int
):
    with pytest.raises(SettingsError, match=rf"listen\.port: 127\.0\.0\.1:{taken_port} .*another"):
        await start_and_stop(config_of(tiny_model, state, listen={"port": taken_port}))


async def test_a_metrics_port_in_use_is_a_settings_error(
    tiny_model: Path, state: State, taken_port: int
):
    config = config_of(tiny_model, state, metrics=Metrics(port=taken_port))
    with pytest.raises(SettingsError, match=rf"metrics\.port: .*{taken_port}"):
        await start_and_stop(config)


async def test_a_second_server_on_the_same_port_is_refused(
    server: Running, tiny_model: Path, state: State
):
    with pytest.raises(SettingsError, match=r"listen\.port"):
        await start_and_stop(config_of(tiny_model, state, listen={"port": server.port}))


async def test_a_missing_model_is_a_settings_error(state: State, tmp_path: Path):
    with pytest.raises(SettingsError, match=r"model\.path: there is no folder"):
        await start_and_stop(config_of(tmp_path / "nowhere", state))
    with pytest.raises(SettingsError, match=r"model\.path: no model is set"):
        await start_and_stop(config_of(tmp_path, state, model=Model()))
    with pytest.raises(SettingsError, match=r"no config\.json"):
        await start_and_stop(config_of(tmp_path, state))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"guidance": {"strategy": "worst_of_n"}},
            r"^guidance\.strategy: there is no worst_of_n; served: best_of_n, .*soft_best_of_n",
        ),
        ({"verdict": {"up": "very good"}}, r"^verdict\.up: 'very good' is \d+ tokens"),
        ({"verdict": {"down": ""}}, r"^verdict\.down: '' is 0 tokens"),
        ({"verdict": {"down": "<|up|>"}}, r"^verdict\.down: has to be another token"),
        (
            {"rewards": {"kind": {"kind": "classifier", "weight": 1.0, "path": "/nowhere"}}},
            r"^rewards\.kind\.path: /nowhere is no model folder",
        ),
    ],
    ids=["strategy", "two tokens", "no token", "the same token", "reward folder"],
)
async def test_what_cannot_be_served_is_a_settings_error_that_names_the_setting(
    tiny_model: Path, state: State, sections: dict[str, Any], said: str
):
    with pytest.raises(SettingsError, match=said):
        await start_and_stop(config_of(tiny_model, state, **sections))


async def test_a_reward_model_of_another_kind_is_a_settings_error(tiny_model: Path, state: State):
    policy = {"kind": "classifier", "weight": 1.0, "path": str(tiny_model)}
    with pytest.raises(SettingsError, match=r"^rewards\.kind\.path: .*LlamaForCausalLM"):
        await start_and_stop(config_of(tiny_model, state, rewards={"kind": policy}))


async def test_a_state_folder_that_cannot_be_written_is_a_settings_error(
    tiny_model: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"state\.folder"):
        await start_and_stop(config_of(tiny_model, State(folder=tmp_path / "file")))


async def test_state_of_another_model_is_a_settings_error(tiny_model: Path, state: State):
    from tests.tiny_model import build_tiny_model

    async with running(tiny_model, state):
        pass
    other = build_tiny_model(state.folder.parent / "other", seed=1)
    with pytest.raises(SettingsError, match="another base model"):
        await start_and_stop(config_of(other, state))


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("gidance: {}", "error: {file}: gidance: unknown setting"),
        ("{}", "error: model.path: no model is set"),
        ("model: {path: /nowhere}", "error: model.path: there is no folder /nowhere"),
    ],
)
def test_a_bad_configuration_ends_the_command_with_one_line_and_status_2(
    tmp_path: Path, settings: str, said: str
):
    file = tmp_path / "server.yaml"
    file.write_text(f"{settings}\n")
    command = [sys.executable, "-X", "importtime", "-m", "server", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(lines) == 1
    assert lines[0].startswith(said.format(file=file))
    assert not any(line.split("|")[-1].strip() == "vllm" for line in done.stderr.splitlines())
