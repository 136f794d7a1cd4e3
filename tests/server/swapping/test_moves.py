"""Operators move the pointer: back, or on to a version that waits."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine as Database

from tests.fakes import BASE
from tests.publishing import Publisher
from tests.swapping import PROMPT, Server, promote, roll_back
from thumbloop.errors import (
    BadPolicyVersion,
    Overloaded,
    StoreUnavailable,
    VersionConflict,
)
from thumbloop.store import deployments, reading
from thumbloop.types import DEFAULT_POLICY, PolicyVersion, Sampling, VersionState


async def test_a_rollback_reaches_the_next_request_and_leaves_those_in_flight(
    line: Server, database: Database
):
    with line.routes.hold() as before:
        moved = await line.swapper.move(roll_back(None, 2))
        assert line.routes.current.number == moved.version == 1
        assert moved.state is VersionState.CURRENT
        assert await line.engine.sample(PROMPT, Sampling(4), before.policy)
    assert line.states() == {0: "retired", 1: "current", 2: "rolled_back"}
    assert line.rows()[2].reason == "it swears"
    assert line.rows()[1].reason == "version 2 was taken back: it swears"
    with reading(database) as connection:
        events = deployments.list_events(connection, DEFAULT_POLICY)[-2:]
    assert [(e["kind"], e["version"], e["actor"]) for e in events] == [
        ("rolled_back", 2, "ann"),
        ("current", 1, "ann"),
    ]
    assert not await line.swapper.step()


async def test_a_promotion_retires_the_version_before(line: Server):
    await line.swapper.move(roll_back(None, 2))
    await line.swapper.move(promote(2, 1))
    assert line.routes.current.number == 2
    assert line.states() == {0: "retired", 1: "retired", 2: "current"}
    assert line.rows()[2].reason == "promoted"


async def test_a_version_that_is_not_loaded_is_attested_before_it_answers(
    start: Callable[..., Server], publisher: Publisher
):
    server = start(max_versions=3)
    await server.settle()
    for number in (1, 2):
        publisher.publish(number, number - 1)
        await server.settle()
    assert server.routes.loaded == (2,)
    await server.swapper.move(roll_back(1, 2))
    assert server.routes.current.number == 1
    await server.settle()
    assert server.held() == ["default-000001-policy", "default-000001-reward"]
    assert server.states() == {0: "retired", 1: "current", 2: "rolled_back"}
    await server.swapper.move(roll_back(0, 1))
    server.engine.speaks_for["default-000002-policy"] = BASE
    with pytest.raises(BadPolicyVersion, match="attestation"):
        await server.swapper.move(promote(2, 0))
    await server.settle()
    assert server.routes.current.number == 0
    assert server.states() == {0: "current", 1: "rolled_back", 2: "rolled_back"}
    assert server.held() == ["default-000000-policy"]


async def test_a_version_that_waits_may_be_promoted_whatever_it_grew_from(
    line: Server, publisher: Publisher
):
    publisher.publish(3, 0)
    await line.swapper.move(promote(3, 2))
    await line.settle()
    assert line.routes.current.number == 3
    assert line.states() == {0: "retired", 1: "retired", 2: "retired", 3: "current"}


async def test_of_two_moves_from_the_same_version_one_loses(line: Server):
    """Either may: both ask the store, from threads of their own, and it lets one through."""
    moves = (line.swapper.move(roll_back(0, 2)), line.swapper.move(roll_back(1, 2)))
    outcomes = await asyncio.gather(*moves, return_exceptions=True)
    (winner,) = (to for to, o in enumerate(outcomes) if isinstance(o, PolicyVersion))
    conflict = outcomes[1 - winner]
    assert isinstance(conflict, VersionConflict)
    assert str(conflict) == f"version 2 is not current, version {winner} is"
    assert line.routes.current.number == winner
    assert line.states() == {winner: "current", 1 - winner: "retired", 2: "rolled_back"}


async def test_where_the_engine_has_no_room_a_move_is_refused(
    start: Callable[..., Server], publisher: Publisher
):
    server = start(max_versions=3)
    await server.settle()
    for number in (1, 2, 3):
        publisher.publish(number, number - 1)
        await server.settle()
    await server.swapper.move(roll_back(2, 3))
    await server.swapper.move(roll_back(1, 2))
    with pytest.raises(Overloaded, match="no room"):
        await server.swapper.move(roll_back(0, 1))
    await server.settle()
    await server.swapper.move(roll_back(0, 1))
    assert server.routes.current.number == 0


async def test_a_move_whose_write_fails_changes_nothing(line: Server):
    with _broken(line), pytest.raises(StoreUnavailable):
        await line.swapper.move(roll_back(None, 2))
    assert line.routes.current.number == 2
    assert line.states() == {0: "retired", 1: "retired", 2: "current"}


async def test_a_version_whose_promotion_could_not_be_written_is_not_loaded_again(
    line: Server, publisher: Publisher
):
    publisher.publish(3, 2)
    await _fail_to_promote(line, 3, 2)
    assert line.states()[3] == "published"
    with line.routes.hold(3) as pinned:
        await line.settle()
        assert line.routes.current is pinned
    assert line.states()[3] == "current"
    assert [name for name in line.held() if "000003" in name] == [
        "default-000003-policy",
        "default-000003-reward",
    ]


async def test_what_was_loaded_for_nothing_stays_while_a_request_needs_it(
    start: Callable[..., Server], publisher: Publisher
):
    server = start(max_versions=3)  # which keeps nothing for pins
    await server.settle()
    publisher.publish(1)
    await _fail_to_promote(server, 1, 0)
    with server.routes.hold(1):
        with _broken(server), pytest.raises(StoreUnavailable):
            await server.swapper.step()
        await asyncio.sleep(0.2)  # longer than it may drain
        assert "default-000001-policy" in server.held()
    await server.settle()
    assert server.states() == {0: "retired", 1: "current"}


async def _fail_to_promote(server: Server, to: int, current: int) -> None:
    with _broken(server), pytest.raises(StoreUnavailable):
        await server.swapper.move(promote(to, current))


@contextmanager
def _broken(server: Server) -> Iterator[None]:
    """Let nothing be written."""

    async def fail(_change: Any) -> Any:
        raise StoreUnavailable("locked")

    run = server.writer.run
    server.writer.run = fail  # type: ignore[method-assign]
    yield
    server.writer.run = run  # type: ignore[method-assign]
