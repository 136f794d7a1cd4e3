"""A version that was learned anew, without a user who was forgotten, takes the tainted one's place."""

from typing import Any

import pytest
from sqlalchemy import Engine as Database

from server.delivery import Move
from server.verification import Expected
from tests.publishing import Publisher
from tests.rows import finished_round, rated
from tests.swapping import QUICK, Server
from tests.trying import PEOPLE, TRIALS, World, has_it
from thumbloop.config import State
from thumbloop.config.delivery import Delivery
from thumbloop.store import GroupWriter, erasure, versions
from thumbloop.types import DEFAULT_POLICY, User


@pytest.fixture
def world(
    tiny_model: Any, database: Database, writer: GroupWriter, state: State, expected: Expected
) -> World:
    return World(tiny_model, database, writer, state, expected)


async def tainted(world: World, publisher: Publisher, settings: Delivery) -> Server:
    """Serve version 2, which grew from version 1, which learned from Ann, who was forgotten."""
    server = world.server(QUICK)
    await server.swapper.start()
    first, ann = publisher.write(1), User(user_id="ann")
    assert first.round_id is not None
    with world.database.begin() as connection:
        reply, thumb = rated(connection, user=ann)
        used = {"new_feedback": (thumb,), "rollouts": (reply,)}
        done = finished_round(1, round_id=first.round_id, **used)
        versions.finish_round(connection, done, first)
    await server.settle()
    publisher.publish(2, 1)
    await server.settle()
    with world.database.begin() as connection:
        done = erasure.erase(connection, DEFAULT_POLICY, ann, at=1.0, actor="operator")
    assert done.tainted == (1, 2)
    server = world.server(settings)
    await server.swapper.start()
    assert server.routes.routed == (2, None)
    return server


async def test_it_becomes_current_where_delivery_is_direct(world: World, publisher: Publisher):
    server = await tainted(world, publisher, QUICK)
    publisher.publish(3)
    await server.settle()
    assert server.states() == {0: "retired", 1: "retired", 2: "retired", 3: "current"}
    assert server.routes.routed == (3, None)
    assert [row.is_tainted for row in server.rows().values()] == [False, True, True, False]
    publisher.publish(4)  # nothing is wrong with version 3
    await server.settle()
    assert server.states()[4] == "rejected"


async def test_it_is_tried_beside_the_tainted_version(world: World, publisher: Publisher):
    server = await tainted(world, publisher, TRIALS)
    publisher.publish(3)
    await server.settle()
    assert server.states() == {0: "retired", 1: "retired", 2: "current", 3: "canary"}
    assert 0 < len(has_it(server)) < len(PEOPLE)

    again = world.server(TRIALS)
    await again.swapper.start()  # a restart takes up both
    assert again.routes.routed == (2, 3)

    world.rate(again, PEOPLE, lambda _user, number: 0.9 if number == 3 else 0.3)
    await again.settle()
    assert again.states() == {0: "retired", 1: "retired", 2: "retired", 3: "current"}
    evidence = world.events()[-1]["detail"]["evidence"]["thumbs"]
    assert evidence["current_users"] > evidence["canary_users"] > 20


async def test_it_is_taken_back_where_its_users_like_it_less(world: World, publisher: Publisher):
    server = await tainted(world, publisher, TRIALS)
    publisher.publish(3)
    await server.settle()
    world.rate(server, PEOPLE, lambda _user, number: 0.3 if number == 3 else 0.9)
    await server.settle()
    assert server.states() == {0: "retired", 1: "retired", 2: "current", 3: "rolled_back"}


async def test_its_trial_is_over_when_another_version_becomes_current(
    world: World, publisher: Publisher
):
    server = await tainted(world, publisher, TRIALS)
    publisher.publish(3)
    await server.settle()
    await server.swapper.move(Move(1, 2, is_rollback=False, reason="", actor=""))  # tainted, too
    await server.settle()
    assert server.states() == {0: "retired", 1: "current", 2: "retired", 3: "rolled_back"}


async def test_what_is_damaged_at_a_start_leaves_the_tainted_one_current(
    world: World, publisher: Publisher, state: State
):
    server = await tainted(world, publisher, TRIALS)
    row = publisher.publish(3)
    await server.settle()
    (state.versions / row.folder / "manifest.json").unlink()
    again = world.server(TRIALS)
    await again.swapper.start()
    assert again.routes.routed == (2, None)
    assert again.states()[3] == "rolled_back"


async def test_a_rollback_from_it_leads_to_the_clean_version_it_grew_from(
    world: World, publisher: Publisher
):
    server = await tainted(world, publisher, QUICK)
    publisher.publish(3)
    await server.settle()
    move = Move(None, 3, is_rollback=True, reason="", actor="")
    assert (await server.swapper.move(move)).version == 0
