"""Operators move the pointer while the planner loads, unloads and moves it, or another server does."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine as Database

from tests.fakes import BASE, FakeEngine
from tests.publishing import Publisher
from tests.swapping import PROMPT, QUICK, Server, promote, roll_back
from thumbloop.errors import EngineUnavailable, PolicyVersionUnavailable
from thumbloop.store import deployments, reading
from thumbloop.types import DEFAULT_POLICY, Sampling, VersionState


async def test_a_rollback_does_not_wait_for_a_version_that_is_being_loaded(
    line: Server, publisher: Publisher
):
    """Nor does that one, a child of what was taken back, become current afterwards."""
    load, may_load, loading = line.engine.load, asyncio.Event(), asyncio.Event()

    async def slowly(name: str, folder: Any) -> Any:
        loading.set()
        await may_load.wait()
        return await load(name, folder)

    line.engine.load = slowly  # type: ignore[method-assign]
    publisher.publish(3, 2)
    stepping = asyncio.create_task(line.swapper.step())
    await loading.wait()
    async with asyncio.timeout(5):
        await line.swapper.move(roll_back(None, 2))
    assert line.routes.current.number == 1
    may_load.set()
    await stepping
    assert line.routes.current.number == 1
    assert not any("000003" in name for name in line.held())
    await line.settle()
    assert line.states()[3] == "rejected"
    assert line.rows()[3].reason.startswith("parent: it was trained from version 2")


async def test_a_move_that_waited_while_the_engine_died_asks_nothing_of_it(
    line: Server, publisher: Publisher
):
    """It would leave the call without an answer."""
    loading = asyncio.Event()

    async def for_ever(_name: str, _folder: Any) -> Any:
        loading.set()
        await asyncio.Event().wait()

    line.engine.load = for_ever  # type: ignore[method-assign]
    publisher.publish(3, 2)
    stepping = asyncio.create_task(line.swapper.step())
    await loading.wait()
    publisher.publish(4, 2)
    moving = asyncio.create_task(line.swapper.move(promote(4, 2)))
    await asyncio.sleep(0.05)
    forgetting = asyncio.create_task(line.swapper.forget())
    await asyncio.sleep(0)
    stepping.cancel()
    with pytest.raises(EngineUnavailable, match="being restarted"):
        await asyncio.wait_for(moving, 5)
    await forgetting
    assert line.states()[2] == "current"


async def test_what_another_server_rejected_meanwhile_is_not_promoted(
    line: Server, publisher: Publisher, database: Database
):
    load = line.engine.load

    async def reject_first(name: str, folder: Any) -> Any:
        with database.begin() as connection:
            rejected = VersionState.REJECTED
            deployments.set_state(connection, DEFAULT_POLICY, 3, rejected, at=1.0, reason="theirs")
        return await load(name, folder)

    line.engine.load = reject_first  # type: ignore[method-assign]
    publisher.publish(3, 2)
    with pytest.raises(PolicyVersionUnavailable, match=r"version 3 is rejected \(theirs\)"):
        await line.swapper.move(promote(3, 2))
    assert line.routes.current.number == 2
    assert line.states()[3] == "rejected"


async def test_what_another_server_rejected_meanwhile_is_not_put_on_trial(
    start: Callable[..., Server], publisher: Publisher, database: Database
):
    server = start(settings=QUICK.model_copy(update={"mode": "canary"}))
    await server.settle()
    begin_trial = server.ledger.begin_trial

    async def reject_first(*arguments: Any, **options: Any) -> None:
        with database.begin() as connection:
            rejected = VersionState.REJECTED
            deployments.set_state(connection, DEFAULT_POLICY, 1, rejected, at=1.0, reason="theirs")
        await begin_trial(*arguments, **options)

    server.ledger.begin_trial = reject_first  # type: ignore[method-assign]
    publisher.publish(1)
    await server.settle()
    assert server.states()[1] == "rejected"
    assert server.routes.routed == (0, None)
    assert not any("000001" in name for name in server.held())


async def test_another_server_follows_a_move(
    line: Server,
    tiny_model: Path,
    start: Callable[..., Server],
):
    other = start(engine=FakeEngine(tiny_model))
    await other.settle()
    assert other.routes.current.number == 2
    await line.swapper.move(roll_back(0, 2))
    await other.settle()
    assert other.routes.current.number == 0
    await line.swapper.move(promote(2, 0))
    await other.settle(1)
    assert other.routes.current.number == 2
    assert other.routes.loaded == (0, 2)


async def test_who_asked_for_a_move_may_leave_and_it_is_done_all_the_same(
    start: Callable[..., Server], publisher: Publisher
):
    server = start(max_versions=3)
    await server.settle()
    for number in (1, 2):
        publisher.publish(number, number - 1)
        await server.settle()
    load, may_load, loading = server.engine.load, asyncio.Event(), asyncio.Event()

    async def slowly(name: str, folder: Any) -> Any:
        loading.set()
        await may_load.wait()
        return await load(name, folder)

    server.engine.load = slowly  # type: ignore[method-assign]
    asking = asyncio.create_task(server.swapper.move(roll_back(1, 2)))
    await loading.wait()
    asking.cancel()
    await asyncio.wait((asking,))
    may_load.set()
    await server.swapper.finish_moves()
    assert server.routes.current.number == 1
    assert server.states() == {0: "retired", 1: "current", 2: "rolled_back"}
    await server.settle()
    assert server.held() == ["default-000001-policy", "default-000001-reward"]


async def test_a_version_that_drains_is_taken_back_as_it_is(
    start: Callable[..., Server], publisher: Publisher
):
    server = start(max_versions=3)
    await server.settle()
    publisher.publish(1)
    with server.routes.hold() as long:
        await server.settle()
        assert server.routes.loaded == (1,)  # 0 drains
        await server.swapper.move(roll_back(0, 1))
        assert server.routes.current is long
        await server.settle()
        assert server.routes.loaded == (0,)
    await server.settle()
    assert server.held() == ["default-000000-policy"]
    with server.routes.hold() as now:
        assert now is long
        assert await server.engine.sample(PROMPT, Sampling(4), now.policy)


async def test_a_version_that_is_leaving_the_engine_is_loaded_anew(
    start: Callable[..., Server], publisher: Publisher
):
    server = start(max_versions=3)
    await server.settle()
    unload, may_unload = server.engine.unload, asyncio.Event()

    async def slowly(adapter: Any) -> None:
        await may_unload.wait()
        await unload(adapter)

    server.engine.unload = slowly  # type: ignore[method-assign]
    publisher.publish(1)
    await server.settle()
    moving = asyncio.create_task(server.swapper.move(roll_back(0, 1)))
    await asyncio.sleep(0.05)
    assert not moving.done()
    may_unload.set()
    await moving
    await server.settle()
    assert server.routes.current.number == 0
    assert server.held() == ["default-000000-policy"]


async def test_what_was_planned_before_a_move_is_not_carried_out_after_it(
    line: Server, publisher: Publisher
):
    """A version is rejected; while that is written an operator goes back, and the rest of the plan is old."""
    publisher.publish(3, 2)
    publisher.publish(4, 2)
    run, is_first = line.writer.run, True

    async def move_first(change: Any) -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            await line.swapper.move(roll_back(0, 2))
        return await run(change)

    line.writer.run = move_first  # type: ignore[method-assign]
    loaded: list[str] = []
    load = line.engine.load

    async def remember(name: str, folder: Any) -> Any:
        loaded.append(name)
        return await load(name, folder)

    line.engine.load = remember  # type: ignore[method-assign]
    assert await line.swapper.step()
    assert loaded == []
    assert line.routes.current.number == 0
    await line.settle()
    assert line.states() == {0: "current", 1: "retired", 2: "rolled_back"} | dict.fromkeys(
        (3, 4), "rejected"
    )


async def test_nothing_is_unloaded_while_a_move_is_being_written(
    line: Server, publisher: Publisher
):
    """It might be what the move leads to."""
    publisher.publish(3, 2)
    await line.swapper.step()  # 0 is one too many now, and still loaded
    assert line.routes.loaded == (0, 1, 2, 3)
    run = line.writer.run

    async def step_first(change: Any) -> Any:
        assert await line.swapper.step()
        return await run(change)

    line.writer.run = step_first  # type: ignore[method-assign]
    await line.swapper.move(roll_back(0, 3))
    line.writer.run = run  # type: ignore[method-assign]
    assert line.routes.current.number == 0
    await line.settle()
    assert line.routes.current.number == 0
    assert 0 in line.routes.loaded


async def test_a_server_that_cannot_follow_a_move_goes_on_with_what_it_has(
    line: Server,
    tiny_model: Path,
    start: Callable[..., Server],
):
    other = start(engine=FakeEngine(tiny_model))
    await other.settle()
    other.engine.speaks_for["default-000001-policy"] = BASE
    await line.swapper.move(roll_back(1, 2))
    assert not await other.swapper.step()  # to be tried again, and not at once
    assert other.routes.current.number == 2
    assert other.states() == {0: "retired", 1: "current", 2: "rolled_back"}
    del other.engine.speaks_for["default-000001-policy"]
    await other.settle()
    assert other.routes.current.number == 1


async def test_a_version_that_an_operator_promotes_unseen_is_attested_and_counted(
    line: Server, publisher: Publisher, database: Database
):
    publisher.publish(3, 0)
    await line.swapper.move(promote(3, 2))
    with reading(database) as connection:
        events = deployments.list_events(connection, DEFAULT_POLICY)[-2:]
    assert [(e["kind"], e["version"]) for e in events] == [("attested", 3), ("current", 3)]
    assert (line.swaps[-1].version.version, line.swaps[-1].result) == (3, VersionState.CURRENT)


async def test_where_the_engine_is_full_the_version_of_another_server_still_finds_room(
    start: Callable[..., Server],
    publisher: Publisher,
    tiny_model: Path,
):
    server = start(max_versions=3)
    await server.settle()
    for number in (1, 2, 3):
        publisher.publish(number, number - 1)
        await server.settle()
    await server.swapper.move(roll_back(2, 3))
    await server.swapper.move(roll_back(1, 2))
    assert len(server.routes.loaded) == 3
    other = start(engine=FakeEngine(tiny_model))
    await other.settle()
    await other.swapper.move(roll_back(0, 1))
    await server.settle()
    assert server.routes.current.number == 0
