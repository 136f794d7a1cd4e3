"""The engine dies: callers are told at once, thumbs are taken, and another engine takes its place."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from server.engine import Adapter
from server.lifecycle import Phase
from tests.fakes import FakeEngine
from tests.publishing import publisher_of
from tests.refusals import refused
from tests.server.test_application import NOT_SERVING, SERVING
from tests.serving import Running, comes_to, health, running, until
from thumbloop.artifacts import WEIGHTS
from thumbloop.config import State
from thumbloop.errors import EngineUnavailable, SettingsError, StoreUnavailable, Unavailable
from thumbloop.v1 import admin_pb2

CANARY = {"mode": "canary", "canary": {"share": 0.5, "look_interval_s": 0.02}}


class Works:
    """Makes engines; a second one only when it may."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.may_start = threading.Event()
        self.failures = 0

    def make(self, model: Path, _config: object) -> FakeEngine:
        if self.engines:
            assert self.may_start.wait(20)
            if self.failures:
                self.failures -= 1
                raise SettingsError("engine: no memory")
        self.engines.append(FakeEngine(model))
        return self.engines[-1]


@pytest.fixture
def works() -> Works:
    return Works()


@asynccontextmanager
async def started(
    model: Path, state: State, works: Works, **sections: Any
) -> AsyncIterator[Running]:
    async with running(model, state, make_engine=works.make, **sections) as server:
        try:
            yield server
        finally:
            works.may_start.set()


@pytest.fixture
async def server(tiny_model: Path, state: State, works: Works) -> AsyncIterator[Running]:
    async with started(tiny_model, state, works) as server:
        yield server


async def unavailable(server: Running, user: str = "ann") -> str:
    refusal = await refused(server.generate("hello", user_id=user))
    assert refusal.code() is grpc.StatusCode.UNAVAILABLE
    return str(refusal.details())


async def test_callers_hear_of_it_at_once_and_another_engine_takes_over(
    server: Running, works: Works
):
    reply = await server.generate("hello", user_id="ann")
    server.engine.is_dead = True
    assert "died" in await unavailable(server)
    await comes_to(NOT_SERVING, server, within_s=2)
    assert "being restarted" in await unavailable(server)
    await server.client.rate(reply.response_id, up=True, user_id="ann")  # thumbs are taken
    async with httpx2.AsyncClient() as client:
        text = (
            await client.get(f"http://127.0.0.1:{server.application.metrics_port}/metrics")
        ).text
    assert "thumbloop_policy_version NaN" in text
    works.may_start.set()
    await until(lambda: len(works.engines) == 2)
    await comes_to(SERVING, server, within_s=10)
    assert works.engines[0].is_closed
    assert (await server.generate("hello", user_id="ann")).policy_version == 0
    async with httpx2.AsyncClient() as client:
        text = (
            await client.get(f"http://127.0.0.1:{server.application.metrics_port}/metrics")
        ).text
    assert "thumbloop_engine_restarts_total 1.0" in text


async def test_calls_under_way_are_unavailable_and_leave_a_row(server: Running, works: Works):
    server.engine.may_sample.clear()
    call = asyncio.create_task(server.generate("hello"))
    await server.sampling(4)
    server.engine.is_dead = True
    server.engine.may_sample.set()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_it_comes_back_on_what_it_served_the_canary_included(
    tiny_model: Path, state: State, works: Works
):
    async with started(tiny_model, state, works, delivery=CANARY) as server:
        await _publish(server, tiny_model, state, 1)
        users = [f"user {n}" for n in range(12)]
        had = {u: (await server.generate("hello", user_id=u)).policy_version for u in users}
        assert set(had.values()) == {0, 1}
        server.engine.is_dead = True
        works.may_start.set()
        await until(lambda: len(works.engines) == 2)
        await until(lambda: server.application._routes.routed == (0, 1))
        await comes_to(SERVING, server, within_s=10)
        for user, version in had.items():
            assert (await server.generate("hello", user_id=user)).policy_version == version


async def test_a_canary_beside_which_the_engine_dies_again_and_again_is_taken_back(
    tiny_model: Path, state: State, works: Works
):
    async with started(tiny_model, state, works, delivery=CANARY) as server:
        works.may_start.set()
        await _publish(server, tiny_model, state, 1)
        for deaths in (1, 2):
            works.engines[-1].is_dead = True
            await until(lambda deaths=deaths: len(works.engines) == deaths + 1)
            await until(lambda: server.application._lifecycle._pipeline is not None)
        shown = await server.client.version(1)
        assert shown.policy_version.reason == "the engine died 2 times beside it"
        assert (await server.generate("hello", user_id="user 1")).policy_version == 0


class Fragile(FakeEngine):
    """Dies of loading what has this in its name, without an answer, as vLLM does."""

    dies_of = "default-000000"

    async def load(self, name: str, folder: Path) -> Adapter:
        await self._die_of(name)
        return await super().load(name, folder)

    async def load_zero(self, name: str) -> Adapter:
        await self._die_of(name)
        return await super().load_zero(name)

    async def _die_of(self, name: str) -> None:
        if name.startswith(self.dies_of):
            self.is_dead = True
            await asyncio.Event().wait()


async def test_one_that_dies_while_the_server_starts_has_another_in_its_place(
    tiny_model: Path, state: State
):
    engines: list[FakeEngine] = []

    def make(model: Path, _config: object) -> FakeEngine:
        engines.append(FakeEngine(model) if engines else Fragile(model))
        return engines[-1]

    async with asyncio.timeout(30), running(tiny_model, state, make_engine=make) as server:
        assert await health(server) == SERVING
        assert (await server.generate("hello", user_id="ann")).policy_version == 0
    assert len(engines) == 2


async def test_one_that_dies_at_every_start_ends_it_with_the_reason(tiny_model: Path, state: State):
    engines: list[Fragile] = []

    def make(model: Path, _config: object) -> Fragile:
        engines.append(Fragile(model))
        return engines[-1]

    with pytest.raises(EngineUnavailable):
        async with (
            asyncio.timeout(30),
            running(tiny_model, state, make_engine=make, engine={"max_restarts_per_hour": 2}),
        ):
            pytest.fail("it serves")
    assert len(engines) == 3
    assert all(engine.is_closed for engine in engines)


async def test_a_canary_of_which_it_dies_while_the_server_starts_is_taken_back(
    tiny_model: Path, state: State, works: Works
):
    async with started(tiny_model, state, works, delivery=CANARY) as server:
        await _publish(server, tiny_model, state, 1)
    engines: list[Fragile] = []

    def make(model: Path, _config: object) -> Fragile:
        engines.append(Fragile(model))
        engines[-1].dies_of = "default-000001"
        return engines[-1]

    async with (
        asyncio.timeout(30),
        running(tiny_model, state, make_engine=make, delivery=CANARY) as server,
    ):
        shown = await server.client.version(1)
        assert shown.policy_version.state == admin_pb2.POLICY_VERSION_STATE_ROLLED_BACK
        assert shown.policy_version.reason == "the engine died 2 times beside it"
        assert (await server.generate("hello", user_id="user 1")).policy_version == 0
    assert len(engines) == 3


async def _publish(server: Running, model: Path, state: State, version: int) -> None:
    publisher_of(server, model, state).publish(version)
    await until(lambda: server.application._routes.routed == (0, version))


async def test_an_engine_that_cannot_start_is_tried_again(server: Running, works: Works):
    works.failures = 2
    works.may_start.set()
    server.engine.is_dead = True
    await until(lambda: len(works.engines) == 2)
    await comes_to(SERVING, server, within_s=10)
    assert works.failures == 0


async def test_one_that_dies_too_often_ends_the_server_with_the_reason(
    tiny_model: Path, state: State, works: Works
):
    works.may_start.set()
    async with started(tiny_model, state, works, engine={"max_restarts_per_hour": 2}) as server:
        run = asyncio.create_task(server.application.run())
        for deaths in (1, 2):
            works.engines[-1].is_dead = True
            await until(lambda deaths=deaths: len(works.engines) == deaths + 1)
            await until(lambda: server.application._lifecycle._pipeline is not None)
        works.engines[-1].is_dead = True
        with pytest.raises(EngineUnavailable):
            await asyncio.wait_for(run, 10)
        assert len(works.engines) == 3
        assert await health(server) == NOT_SERVING


async def test_stopping_while_an_engine_starts_waits_for_it_and_closes_it(
    tiny_model: Path, state: State, works: Works
):
    async with started(tiny_model, state, works) as server:
        server.engine.is_dead = True
        await until(lambda: works.engines[0].is_closed)
        stopping = asyncio.create_task(server.application.stop())
        await asyncio.sleep(0.1)
        assert not stopping.done()
        works.may_start.set()
        await asyncio.wait_for(stopping, 10)
        assert all(engine.is_closed for engine in works.engines)
        assert server.application._lifecycle.phase is Phase.DRAINING


async def test_an_operator_goes_back_while_it_restarts_from_the_version_that_it_died_of(
    tiny_model: Path, state: State, works: Works
):
    async with started(tiny_model, state, works) as server:
        publisher_of(server, tiny_model, state).publish(1)
        await until(lambda: server.application._routes.routed == (1, None))
        server.engine.is_dead = True
        await until(lambda: works.engines[0].is_closed)
        moved = await server.client.roll_back(expected_current=1, reason="it kills the engine")
        assert moved.policy_version == 0
        works.may_start.set()
        await comes_to(SERVING, server, within_s=10)
        assert (await server.generate("hello")).policy_version == 0
        assert "default-000001-policy" not in [a.name for a in works.engines[1].loaded.values()]


async def test_a_move_to_a_version_that_nobody_has_checked_waits_for_the_engine(
    tiny_model: Path, state: State, works: Works
):
    async with started(tiny_model, state, works) as server:
        publisher = publisher_of(server, tiny_model, state)
        server.engine.is_dead = True
        await until(lambda: works.engines[0].is_closed)
        publisher.publish(1)
        with pytest.raises(Unavailable, match="has to be checked first"):
            await server.client.promote(1, expected_current=0)
        works.may_start.set()
        await comes_to(SERVING, server, within_s=10)


async def test_a_version_that_is_damaged_meanwhile_is_taken_back(
    tiny_model: Path, state: State, works: Works
):
    async with started(tiny_model, state, works) as server:
        row = publisher_of(server, tiny_model, state).publish(1)
        await until(lambda: server.application._routes.routed == (1, None))
        weights = state.versions / row.folder / "policy" / WEIGHTS
        weights.write_bytes(b"rotten" + weights.read_bytes())
        works.may_start.set()
        server.engine.is_dead = True
        await until(lambda: len(works.engines) == 2)
        await comes_to(SERVING, server, within_s=10)
        assert (await server.generate("hello")).policy_version == 0


async def test_a_version_that_the_engine_dies_of_when_it_is_loaded_is_rejected(
    tiny_model: Path, state: State, works: Works
):
    works.may_start.set()
    kills = ("default-000001-policy",)

    def make(model: Path, config: object) -> FakeEngine:
        engine = works.make(model, config)
        load = engine.load

        async def die(name: str, folder: Path) -> Any:
            if name in kills:
                engine.is_dead = True
                await asyncio.Event().wait()  # as vLLM does: nobody answers any more
            return await load(name, folder)

        engine.load = die  # type: ignore[method-assign]
        return engine

    async with running(tiny_model, state, make_engine=make) as server:
        publisher_of(server, tiny_model, state).publish(1)
        await until(lambda: len(works.engines) == 3)
        await until(lambda: server.application._lifecycle._pipeline is not None)
        shown = (await server.client.version(1)).policy_version
        assert shown.reason == "the engine died 2 times beside it"
        assert (await server.generate("hello")).policy_version == 0


async def test_a_store_that_is_away_for_a_moment_is_waited_for(
    server: Running, works: Works, monkeypatch: pytest.MonkeyPatch
):
    ledger = server.application._supervisor.swapper._ledger
    rows, failures = ledger.rows, iter(range(3))

    async def fail() -> Any:
        if next(failures, None) is not None:
            raise StoreUnavailable("database is locked")
        return await rows()

    works.may_start.set()
    server.engine.is_dead = True
    await until(lambda: works.engines[0].is_closed)
    monkeypatch.setattr(ledger, "rows", fail)
    await until(lambda: len(works.engines) == 2)
    await comes_to(SERVING, server, within_s=10)
    assert len(works.engines) == 2


async def test_a_move_under_way_when_the_engine_dies_ends(
    tiny_model: Path, state: State, works: Works
):
    async with started(tiny_model, state, works, engine={"max_versions": 3}) as server:
        publisher = publisher_of(server, tiny_model, state)
        for number in (1, 2):
            publisher.publish(number, number - 1)
            await until(lambda number=number: server.application._routes.routed == (number, None))
        await until(lambda: server.application._routes.loaded == (2,))
        loading = asyncio.Event()

        async def never(_name: str, _folder: Path) -> Any:
            loading.set()
            await asyncio.Event().wait()

        server.engine.load = never
        request = admin_pb2.RollbackPolicyVersionRequest(expected_current_version=2)
        moving = asyncio.create_task(refused(server.admin.RollbackPolicyVersion(request)))
        await asyncio.wait_for(loading.wait(), 10)
        works.may_start.set()
        server.engine.is_dead = True
        refusal = await asyncio.wait_for(moving, 10)
        assert "the engine died meanwhile" in str(refusal.details())
        await comes_to(SERVING, server, within_s=10)
        assert (await server.generate("hello")).policy_version == 2
