"""A version is tried on a few users, and what they say of it decides; real store, fake engine."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine as Database

from server.canary import unit_of
from server.delivery import Move
from server.verification import Expected
from tests.publishing import Publisher
from tests.rows import candidate, interaction
from tests.swapping import Server
from tests.trying import PEOPLE, TRIALS, World, has_it
from thumbloop.artifacts import WEIGHTS
from thumbloop.config import State
from thumbloop.config.delivery import Canary, Guards
from thumbloop.store import GroupWriter, feedback, interactions
from thumbloop.types import Status, User


@pytest.fixture
def world(
    tiny_model: Any, database: Database, writer: GroupWriter, state: State, expected: Expected
) -> World:
    return World(tiny_model, database, writer, state, expected)


@pytest.fixture
async def server(world: World, publisher: Publisher) -> Server:
    """Version 1 is on trial beside the base model."""
    server = world.server()
    await server.swapper.start()
    publisher.publish(1)
    await server.settle()
    return server


def equal(_user: User, _version: int) -> float:
    return 0.5


def better(_user: User, version: int) -> float:
    return 0.9 if version == 1 else 0.3


def worse(_user: User, version: int) -> float:
    return 0.1 if version == 1 else 0.7


async def test_a_version_that_passes_answers_a_share_of_the_users(server: Server, world: World):
    assert server.states() == {0: "current", 1: "canary"}
    assert server.routes.routed == (0, 1)
    users = has_it(server)
    assert 0.2 < len(users) / len(PEOPLE) < 0.4
    assert has_it(server) == users
    with server.routes.hold(0, unit_of(users[0], "")) as pinned:
        assert pinned.number == 0
    (swap,) = server.swaps
    assert swap.result.value == "canary"
    assert swap.published_to_serving_s is not None
    began = world.events()[-1]
    assert (began["kind"], began["version"]) == ("canary", 1)
    assert began["detail"]["terms"]["share"] == 0.3
    assert set(began["detail"]["terms"]["margins"]) == {
        "errors",
        "latency",
        "length",
        "repetition",
        "refusals",
        "divergence",
    }
    assert not await server.swapper.step()


async def test_what_its_users_like_more_is_promoted_with_the_evidence(server: Server, world: World):
    world.rate(server, PEOPLE, better)
    with server.routes.hold(unit=unit_of(has_it(server)[0], "")) as in_flight:
        await server.settle()
        assert in_flight.number == 1
    assert server.states() == {0: "retired", 1: "current"}
    assert server.routes.routed == (1, None)
    decided = world.events()[-1]
    assert decided["kind"] == "current"
    assert decided["detail"]["reason"].startswith("thumbs: 0.898 of ")
    thumbs = decided["detail"]["evidence"]["thumbs"]
    assert thumbs["canary_users"] + thumbs["current_users"] == len(PEOPLE)
    assert thumbs["log_higher"] > 3
    assert server.swapper.latest_look is None
    assert [s.result.value for s in server.swaps] == ["canary", "current"]


async def test_what_they_like_less_is_taken_back(server: Server, world: World):
    users = has_it(server)
    world.rate(server, PEOPLE, worse)
    with server.routes.hold(unit=unit_of(users[0], "")) as in_flight:
        await server.settle()
        assert in_flight.number == 1
    assert server.states() == {0: "current", 1: "rolled_back"}
    assert server.routes.routed == (0, None)
    assert has_it(server) == []
    assert server.rows()[1].reason.startswith("thumbs: 0.1")
    assert world.events()[-1]["detail"]["evidence"]["thumbs"]["log_lower"] > 3


async def test_of_an_equal_one_nothing_is_known_and_the_horizon_ends_it(
    server: Server, world: World
):
    world.rate(server, PEOPLE[:300], equal)
    await server.settle()
    assert server.states() == {0: "current", 1: "canary"}
    assert server.swapper.latest_look.evidence["thumbs"].canary_users < 200
    world.rate(server, [User("", f"another {n}") for n in range(600)], equal)
    await server.settle()
    assert server.states() == {0: "current", 1: "rolled_back"}
    assert server.rows()[1].reason.startswith("undecided; thumbs: ")


async def test_however_long_a_look_takes_the_next_is_soon(server: Server, world: World):
    world.rate(server, PEOPLE[:100], equal)
    await server.settle()
    for took_s, rest_s in ((0.1, 2.0), (1000.0, 30.0)):
        server.swapper.latest_look = server.swapper.latest_look._replace(took_s=took_s)
        assert server.swapper._rest_s() == pytest.approx(rest_s)


async def test_only_the_first_thumb_of_a_user_counts(server: Server, world: World):
    world.rate(server, PEOPLE[:100], equal)
    one = has_it(server)[:1]
    for _ in range(400):
        world.rate(server, one, lambda _user, _version: 0.0)
    await server.settle()
    evidence = server.swapper.latest_look.evidence["thumbs"]
    assert evidence.canary_users + evidence.current_users == 100
    assert server.states()[1] == "canary"


async def test_who_pins_a_version_or_is_nobody_does_not_count(server: Server, world: World):
    others = [user for user in PEOPLE if user not in has_it(server)]
    world.rate(server, others[:60], better, pinned=1)
    world.rate(server, [User()] * 60, better, session_id="")
    await server.settle()
    evidence = server.swapper.latest_look.evidence["thumbs"]
    assert (evidence.canary_users, evidence.current_users) == (0, 0)
    world.rate(server, [User()], better, session_id="a session")
    await server.settle()
    evidence = server.swapper.latest_look.evidence["thumbs"]
    assert evidence.canary_users + evidence.current_users == 0  # it was routed without its session


async def test_who_pins_the_own_version_does_not_count_either(server: Server, world: World):
    world.rate(server, has_it(server)[:20], better, pinned=1)
    await server.settle()
    assert server.swapper.latest_look.evidence["thumbs"].canary_users == 0


async def test_a_thumb_for_a_reply_that_came_to_nothing_is_no_vote(server: Server, world: World):
    (user,) = has_it(server)[:1]
    with world.database.begin() as connection:
        broken = interaction(
            policy_version=1,
            user=user,
            created_at=time.time(),
            status=Status.CANCELLED,
            candidates=(),
        )
        interactions.append(connection, broken)
        feedback.submit_thumb(connection, broken.response_id, 0, user, at=time.time())
    world.rate(server, [user], lambda _user, _version: 1.0)
    await server.settle()
    evidence = server.swapper.latest_look.evidence["thumbs"]
    assert (evidence.canary_users, evidence.canary_mean) == (1, 1.0)


async def test_what_was_taken_back_elsewhere_is_not_promoted(server: Server, world: World):
    other = world.server()
    await other.swapper.start()
    world.rate(server, PEOPLE, better)
    run = server.writer.run

    async def others_first(change: Any) -> Any:
        server.writer.run = run  # type: ignore[method-assign]
        await other.swapper.move(operator(0, 0, is_rollback=True))
        return await run(change)

    server.writer.run = others_first  # type: ignore[method-assign]
    await server.settle()
    assert server.states() == {0: "current", 1: "rolled_back"}
    assert server.routes.routed == (0, None)


async def test_thumbs_for_replies_of_before_the_trial_do_not_count(server: Server, world: World):
    world.rate(server, PEOPLE[:60], better, created_at=time.time() - 3600)
    await server.settle()
    assert server.swapper.latest_look.evidence["thumbs"].canary_users == 0


def _long(version: int) -> dict[str, Any]:
    return {"candidates": (candidate(token_ids=tuple(range(3 if version == 0 else 400))),)}


def _repeating(version: int) -> dict[str, Any]:
    ids = tuple(range(30)) if version == 0 else (5,) * 30
    return {"candidates": (candidate(token_ids=ids),)}


def _declining(version: int) -> dict[str, Any]:
    text = "It was fine." if version == 0 else "I'm sorry, I cannot say."
    return {"candidates": (candidate(text=text),)}


def _slow(version: int) -> dict[str, Any]:
    return {"duration_s": 0.5 if version == 0 else 5.0}


def _failing(version: int) -> dict[str, Any]:
    if version == 0:
        return {}
    return {"status": Status.FAILED, "candidates": (), "untrainable_reason": "failed"}


def _overpraised(version: int) -> dict[str, Any]:
    return {"candidates": (candidate(reward=-3.0 if version == 0 else 6.0),)}


def _overpraised_in_part(version: int) -> dict[str, Any]:
    """What thumbs are promised is a part of the reward; the whole says nothing."""
    parts = {"thumbs": -3.0 if version == 0 else 6.0, "length": 1.0}
    return {"candidates": (candidate(reward=0.0, reward_components=parts),)}


@pytest.mark.parametrize(
    ("guard", "differs"),
    [
        ("length", _long),
        ("repetition", _repeating),
        ("refusals", _declining),
        ("latency", _slow),
        ("errors", _failing),
        ("divergence", _overpraised),
        ("divergence", _overpraised_in_part),
    ],
)
async def test_a_guard_takes_it_back_whatever_the_thumbs_say(
    server: Server, world: World, guard: str, differs: Callable[[int], dict[str, Any]]
):
    users = has_it(server)
    for n, user in enumerate(PEOPLE[:150]):  # one by one, as replies differ
        different = differs(1 if user in users else 0)
        ended = time.time() + 10.0 * n + different.get("duration_s", 0.0)
        world.rate(server, [user], equal, created_at=ended, **different)
    await server.settle()
    assert server.states() == {0: "current", 1: "rolled_back"}
    assert server.rows()[1].reason.startswith(f"{guard}: ")
    assert guard in world.events()[-1]["detail"]["evidence"]


async def test_one_corrupted_reply_is_enough(server: Server, world: World):
    changes = {"status": Status.FAILED, "candidates": (), "untrainable_reason": "corrupted"}
    world.rate(server, has_it(server)[:1], equal, **changes)
    await server.settle()
    assert server.rows()[1].reason == "corrupted: 1 replies"


async def test_a_restart_comes_back_with_the_canary_and_its_users(server: Server, world: World):
    users, since = has_it(server), server.rows()[1].state_since
    other_settings = TRIALS.model_copy(update={"canary": Canary(share=0.9)})
    again = world.server(other_settings)
    await again.swapper.start()
    assert again.routes.routed == (0, 1)
    assert again.held() == [
        "default-000000-policy",
        "default-000001-policy",
        "default-000001-reward",
    ]
    assert has_it(again) == users  # by the terms that it began with
    assert again.rows()[1].state_since == since
    world.rate(again, PEOPLE, better)
    await again.settle()
    assert again.states() == {0: "retired", 1: "current"}


async def test_a_restart_whose_canary_is_damaged_takes_it_back(
    server: Server, world: World, state: State
):
    weights = state.versions / server.rows()[1].folder / "policy" / WEIGHTS
    weights.write_bytes(b"rotten" + weights.read_bytes())
    again = world.server()
    await again.swapper.start()
    assert again.routes.routed == (0, None)
    assert again.states() == {0: "current", 1: "rolled_back"}
    assert again.rows()[1].reason.startswith("at start: file_altered")


async def test_one_version_waits_and_a_newer_one_supersedes_it(
    server: Server, world: World, publisher: Publisher
):
    publisher.publish(2, 0)
    await server.settle()
    assert server.states() == {0: "current", 1: "canary", 2: "published"}
    publisher.publish(3, 0)
    await server.settle()
    assert server.states() == {0: "current", 1: "canary", 2: "rejected", 3: "published"}
    world.rate(server, PEOPLE, worse)
    await server.settle(6)
    assert server.states() == {0: "current", 1: "rolled_back", 2: "rejected", 3: "canary"}
    assert server.routes.routed == (0, 3)


async def test_what_waited_beside_a_version_that_is_promoted_is_rejected(
    server: Server, world: World, publisher: Publisher
):
    publisher.publish(2, 0)
    world.rate(server, PEOPLE, better)
    await server.settle()
    assert server.states() == {0: "retired", 1: "current", 2: "rejected"}
    assert server.rows()[2].reason.startswith("parent: ")


async def test_the_current_version_is_loaded_with_the_canary_in_the_smallest_engine(
    world: World, publisher: Publisher
):
    server = world.server(max_versions=3)
    server.engine.max_adapters = 6
    await server.swapper.start()
    for number, rates in ((1, better), (2, equal)):
        publisher.publish(number, number - 1)
        await server.settle()
        world.rate(server, PEOPLE, rates)
        await server.settle()
    assert server.states() == {0: "retired", 1: "current", 2: "canary"}
    assert server.routes.loaded == (1, 2)
    assert server.engine.most_loaded <= 6


# Operators, and more than one server


def operator(to: int | None, expected: int, *, is_rollback: bool) -> Move:
    return Move(to, expected, is_rollback=is_rollback, reason="", actor="ann")


async def test_a_rollback_to_the_current_version_ends_the_trial(server: Server, world: World):
    with server.routes.hold(unit=unit_of(has_it(server)[0], "")) as in_flight:
        moved = await server.swapper.move(operator(0, 0, is_rollback=True))
        assert moved.version == 0
        assert server.routes.routed == (0, None)
        assert in_flight.number == 1
    assert server.states() == {0: "current", 1: "rolled_back"}
    assert world.events()[-1]["actor"] == "ann"
    await server.settle()
    assert server.routes.routed == (0, None)


@pytest.mark.parametrize("to", [0, 1])
async def test_an_operator_decides_with_the_evidence_that_there_is(
    server: Server, world: World, to: int
):
    world.rate(server, PEOPLE[:100], equal)
    await server.settle()
    assert server.states() == {0: "current", 1: "canary"}
    await server.swapper.move(operator(to, 0, is_rollback=to == 0))
    decided = world.events()[-1]
    assert (decided["version"], decided["actor"]) == (1, "ann")
    thumbs = decided["detail"]["evidence"]["thumbs"]
    assert thumbs["canary_users"] + thumbs["current_users"] == 100


async def test_an_operator_may_promote_the_canary(server: Server):
    await server.swapper.move(operator(1, 0, is_rollback=False))
    assert server.routes.routed == (1, None)
    await server.settle()
    assert server.states() == {0: "retired", 1: "current"}


async def test_a_trial_ends_when_its_control_is_taken_back(
    server: Server, world: World, publisher: Publisher
):
    world.rate(server, PEOPLE, better)
    await server.settle()
    publisher.publish(2, 1)
    await server.settle()
    assert server.routes.routed == (1, 2)
    await server.swapper.move(operator(None, 1, is_rollback=True))
    assert server.routes.routed == (0, None)  # at once: 2 grew from what was taken back
    await server.settle()
    assert server.states() == {0: "current", 1: "rolled_back", 2: "rolled_back"}
    assert server.rows()[2].reason == "parent: version 0 came in the place of version 1"


async def test_without_trials_the_canary_becomes_current(server: Server, world: World):
    again = world.server(TRIALS.model_copy(update={"mode": "direct"}))
    await again.swapper.start()
    await again.settle()
    assert again.states() == {0: "retired", 1: "current"}


async def test_another_server_follows_the_trial(server: Server, world: World):
    other = world.server()
    await other.swapper.start()
    assert other.routes.routed == (0, 1)
    assert has_it(other) == has_it(server)
    world.rate(other, PEOPLE, worse)
    await server.settle()
    await other.settle()
    assert other.routes.routed == (0, None)
    assert other.states() == {0: "current", 1: "rolled_back"}
    assert [e["kind"] for e in world.events()] == ["attested", "canary", "rolled_back"]


async def test_of_two_servers_that_try_the_same_version_one_begins_the_trial(
    world: World, publisher: Publisher
):
    servers = [world.server(), world.server()]
    for server in servers:
        await server.swapper.start()
    publisher.publish(1)
    await asyncio.gather(*(server.swapper.step() for server in servers))
    for server in servers:
        await server.settle()
        assert server.routes.routed == (0, 1)
    assert [e["kind"] for e in world.events()].count("canary") == 1


async def test_of_two_servers_that_try_the_same_version_one_makes_it_current(
    world: World, publisher: Publisher
):
    servers = [world.server(TRIALS.model_copy(update={"mode": "direct"})) for _ in range(2)]
    for server in servers:
        await server.swapper.start()
    publisher.publish(1)
    await asyncio.gather(*(server.swapper.step() for server in servers))
    for server in servers:
        await server.settle()
        assert server.routes.routed == (1, None)
        assert server.states() == {0: "retired", 1: "current"}


async def test_watching_hears_of_thumbs_though_no_version_changes(server: Server, world: World):
    watching = asyncio.create_task(server.swapper.watch())
    await asyncio.sleep(0.1)
    world.rate(server, PEOPLE, worse)
    async with asyncio.timeout(120):
        while server.routes.routed.canary is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    watching.cancel()


async def test_terms_are_those_of_the_replies_before(world: World, publisher: Publisher):
    server = world.server()
    await server.swapper.start()
    for seconds, tokens in ((1.0, 10), (3.0, 30), (9.0, 90)):  # before the trial: no matter when
        reply = candidate(token_ids=tuple(range(tokens)))
        world.rate(server, PEOPLE[:1], equal, duration_s=seconds, candidates=(reply,))
    publisher.publish(1)
    await server.settle()
    terms = world.events()[-1]["detail"]["terms"]
    assert (terms["typical_s"], terms["typical_tokens"]) == (3.0, 30.0)


async def test_a_guard_that_may_err_as_it_likes_never_trips(world: World, publisher: Publisher):
    wide = Guards(length=1.0, repetition=1.0, refusals=1.0, latency=1.0, errors=1.0, divergence=1.0)
    canary = TRIALS.canary.model_copy(update={"guards": wide})
    server = world.server(TRIALS.model_copy(update={"canary": canary}))
    await server.swapper.start()
    publisher.publish(1)
    await server.settle()
    users = has_it(server)
    for user in PEOPLE[:150]:
        world.rate(server, [user], equal, **_long(1 if user in users else 0))
    await server.settle()
    assert server.states()[1] == "canary"
