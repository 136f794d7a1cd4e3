"""Published versions come to answer, or are rejected, without anybody's request noticing."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine as Database

from server import hotswap
from tests.fakes import BASE
from tests.publishing import Publisher
from tests.swapping import PROMPT, QUICK, Server
from thumbloop.artifacts import WEIGHTS
from thumbloop.errors import (
    BadPolicyVersion,
    EngineUnavailable,
    StoreUnavailable,
)
from thumbloop.store import deployments, reading, versions
from thumbloop.types import DEFAULT_POLICY, PolicyVersion, Sampling, VersionState


async def test_a_blank_store_is_served_from_the_base_model(server: Server):
    assert server.routes.loaded == (0,)
    assert server.routes.current.reward is None
    assert server.held() == ["default-000000-policy"]


async def test_a_published_version_becomes_current(server: Server, publisher: Publisher):
    row = publisher.publish(1)
    await server.swapper.step()
    assert server.routes.current.number == 1
    assert server.states() == {0: "retired", 1: "current"}
    (swap,) = server.swaps
    assert (swap.version.version, swap.result) == (1, VersionState.CURRENT)
    assert 0 <= swap.published_to_serving_s < 10
    assert server.routes.current.facts.policy_digest == row.policy_digest
    await server.settle()
    assert server.routes.loaded == (0, 1)


async def test_each_step_of_its_life_is_an_event(
    server: Server, publisher: Publisher, database: Database
):
    publisher.publish(1)
    await server.settle()
    with reading(database) as connection:
        events = deployments.list_events(connection, DEFAULT_POLICY)
    assert [(e["kind"], e["version"]) for e in events] == [("attested", 1), ("current", 1)]


def _nan(folder: Any) -> None:
    values = load_file(folder / "policy" / WEIGHTS)
    next(iter(values.values())).fill_(float("nan"))
    save_file(values, folder / "policy" / WEIGHTS)


async def test_a_version_that_fails_a_check_is_rejected_and_the_old_one_serves_on(
    server: Server, publisher: Publisher
):
    publisher.publish(1, spoil=_nan)
    await server.settle()
    assert server.states() == {0: "current", 1: "rejected"}
    assert server.rows()[1].reason.startswith("not_finite: ")
    assert server.routes.current.number == 0
    assert server.held() == ["default-000000-policy"]
    assert [s.result for s in server.swaps] == [VersionState.REJECTED]
    publisher.publish(2)
    await server.settle()
    assert server.states() == {0: "retired", 1: "rejected", 2: "current"}


async def test_a_version_that_fails_attestation_leaves_the_engine(
    server: Server, publisher: Publisher
):
    publisher.publish(1)
    server.engine.speaks_for["default-000001-policy"] = BASE
    await server.settle()
    assert server.rows()[1].reason.startswith("attestation: ")
    assert server.held() == ["default-000000-policy"]
    assert server.routes.loaded == (0,)


async def test_a_load_that_the_engine_refuses_rejects_the_version_and_leaves_nothing(
    server: Server, publisher: Publisher
):
    publisher.publish(1)
    load = server.engine.load

    async def refuse_rewards(name: str, folder: Any) -> Any:
        if name.endswith("reward"):
            raise BadPolicyVersion("engine_refused", name)
        return await load(name, folder)

    server.engine.load = refuse_rewards  # type: ignore[method-assign]
    await server.settle()
    assert server.rows()[1].reason.startswith("engine_refused")
    assert server.held() == ["default-000000-policy"]


async def test_a_request_in_flight_finishes_on_its_version_and_new_ones_go_to_the_next(
    server: Server, publisher: Publisher
):
    with server.routes.hold() as before:
        publisher.publish(1)
        await server.settle()
        with server.routes.hold() as after:
            assert (before.number, after.number) == (0, 1)
            assert await server.engine.sample(PROMPT, Sampling(4), before.policy)


async def test_old_versions_are_unloaded_once_they_have_drained(
    start: Callable[..., Server], publisher: Publisher
):
    server = start(max_versions=3)
    await server.settle()
    with server.routes.hold(0) as held:
        publisher.publish(1)
        await server.settle()
        assert server.routes.loaded == (1,)  # no new request gets 0, but the engine still holds it
        assert "default-000000-policy" in server.held()
        assert await server.engine.sample(PROMPT, Sampling(4), held.policy)
        await asyncio.sleep(0.1)  # longer than drain_timeout_s: reported, not dropped
        assert "default-000000-policy" in server.held()
    await server.settle()
    assert server.held() == ["default-000001-policy", "default-000001-reward"]


@pytest.mark.parametrize("max_versions", [3, 4, 5])
async def test_many_swaps_under_load_never_take_more_slots_than_there_are(
    start: Callable[..., Server], publisher: Publisher, max_versions: int
):
    server = start(max_versions=max_versions)
    server.engine.max_adapters = 2 * max_versions
    await server.settle()
    stopping = asyncio.Event()
    answered: set[int] = set()

    async def use() -> None:
        while not stopping.is_set():
            with server.routes.hold() as version:
                for _ in range(5):
                    await server.engine.sample(PROMPT, Sampling(2), version.policy)
                    await asyncio.sleep(0.001)
                answered.add(version.number)

    users = [asyncio.create_task(use()) for _ in range(6)]
    for number in range(1, 9):
        publisher.publish(number, number - 1)
        await server.swapper.step()
        await asyncio.sleep(0.01)
    stopping.set()
    await asyncio.gather(*users)
    await server.settle()
    assert answered >= set(range(1, 8))
    assert server.engine.most_loaded <= 2 * max_versions
    assert len(server.routes.loaded) == max_versions - 2
    assert len(server.held()) == 2 * (max_versions - 2)


async def test_a_version_whose_drain_takes_long_holds_up_the_next_but_not_the_requests(
    start: Callable[..., Server], publisher: Publisher
):
    server = start(max_versions=3)
    await server.settle()
    with server.routes.hold():
        publisher.publish(1)
        await server.settle()
        with server.routes.hold():
            publisher.publish(2, 1)
            await server.settle()
            publisher.publish(3, 2)
            waiting = asyncio.create_task(server.settle(1))
            await asyncio.sleep(0.2)
            assert not waiting.done()  # 0 and 1 drain, 2 answers: no slot is free
            with server.routes.hold() as version:
                assert version.number == 2
        await waiting
    assert server.routes.current.number == 3


async def test_superseded_and_orphaned_versions_are_rejected_without_being_loaded(
    server: Server, publisher: Publisher
):
    publisher.publish(1)
    publisher.publish(2)
    await server.settle()
    assert server.states() == {0: "retired", 1: "rejected", 2: "current"}
    assert server.rows()[1].reason == "superseded: version 2 is newer"
    publisher.publish(3, 0)
    await server.settle()
    assert server.states()[3] == "rejected"
    assert server.rows()[3].reason.startswith("parent: ")
    assert not any("000001" in name or "000003" in name for name in server.held())


async def test_a_version_whose_probes_the_engine_gives_up_on_is_rejected(
    server: Server, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
):
    async def give_up(*_arguments: Any, **_options: Any) -> tuple[float, ...]:
        raise EngineUnavailable("the engine gave up on a request")

    publisher.publish(1)
    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "next_logprobs", give_up)
        await server.settle()
    assert server.states() == {0: "current", 1: "rejected"}
    assert server.rows()[1].reason.startswith("not_answered")
    assert server.held() == ["default-000000-policy"]


@pytest.mark.parametrize("failing", [1, 2], ids=["attested", "current"])
async def test_a_store_that_is_away_for_a_moment_costs_one_try_and_leaks_no_adapter(
    server: Server, publisher: Publisher, failing: int
):
    publisher.publish(1)
    run, calls = server.writer.run, iter(range(1, 100))

    async def fail_once(change: Any) -> Any:
        if next(calls) == failing:
            raise StoreUnavailable("locked")
        return await run(change)

    server.writer.run = fail_once  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable):
        await server.swapper.step()
    assert server.routes.current.number == 0
    await asyncio.sleep(0.1)  # nobody uses it
    assert server.held() == ["default-000000-policy"]
    await server.settle()
    assert server.routes.current.number == 1
    assert server.states() == {0: "retired", 1: "current"}


async def test_versions_are_read_when_something_has_changed_and_not_at_each_look(
    server: Server, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
):
    readings = 0
    listed = versions.list_versions

    def count(*arguments: Any, **options: Any) -> list[PolicyVersion]:
        nonlocal readings
        readings += 1
        return listed(*arguments, **options)

    monkeypatch.setattr(versions, "list_versions", count)
    watching = asyncio.create_task(server.swapper.watch())
    await asyncio.sleep(20 * QUICK.poll_interval_s)
    assert readings == 1
    for number in (1, 2):
        publisher.publish(number, number - 1)
        async with asyncio.timeout(10):
            while server.routes.current.number != number:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    await asyncio.sleep(20 * QUICK.poll_interval_s)
    settled = readings
    await asyncio.sleep(20 * QUICK.poll_interval_s)
    assert readings == settled
    watching.cancel()
    monkeypatch.setattr(hotswap, "_LOOK_AGAIN_S", 0.0)
    watching = asyncio.create_task(server.swapper.watch())
    await asyncio.sleep(20 * QUICK.poll_interval_s)
    assert readings > settled + 2, "now and then all are read, whatever the events say"
    watching.cancel()


@pytest.mark.parametrize("switch", ["is_full", "is_too_full_to_score"])
async def test_watching_waits_out_a_full_queue(server: Server, publisher: Publisher, switch: str):
    setattr(server.engine, switch, True)
    watching = asyncio.create_task(server.swapper.watch())
    publisher.publish(1)
    await asyncio.sleep(0.1)
    assert server.routes.current.number == 0
    setattr(server.engine, switch, False)
    async with asyncio.timeout(20):
        while server.routes.current.number != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert server.states() == {0: "retired", 1: "current"}
    watching.cancel()


async def test_watching_ends_when_the_engine_does(server: Server, publisher: Publisher):
    server.engine.is_dead = True
    publisher.publish(1)
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(server.swapper.watch(), 5)
    assert server.states() == {0: "current", 1: "published"}


async def test_a_pin_to_a_rejected_version_says_that_it_exists(
    server: Server, publisher: Publisher
):
    publisher.publish(1, spoil=_nan)
    await server.settle()
    with pytest.raises(Exception, match="version 1 is not loaded"), server.routes.hold(1):
        pass
    with pytest.raises(Exception, match="no version 2"), server.routes.hold(2):
        pass


async def test_a_row_whose_folder_never_came_is_rejected(server: Server, publisher: Publisher):
    publisher.insert(replace(publisher.write(1), folder="default/000099"))
    await server.settle()
    assert server.rows()[1].reason.startswith("manifest_missing")
