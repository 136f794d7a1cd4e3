"""Published versions come to answer, or are rejected, without anybody's request noticing."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine as Database

from server import hotswap
from server.delivery import Move
from server.verification import Expected
from tests.fakes import BASE, FakeEngine
from tests.publishing import Publisher
from tests.swapping import QUICK, Server
from thumbloop.artifacts import WEIGHTS
from thumbloop.config import State
from thumbloop.errors import (
    BadPolicyVersion,
    EngineUnavailable,
    Overloaded,
    PolicyVersionUnavailable,
    SettingsError,
    StoreUnavailable,
    VersionConflict,
)
from thumbloop.store import GroupWriter, deployments, reading, versions
from thumbloop.types import DEFAULT_POLICY, PolicyVersion, Sampling, VersionState

PROMPT = (40, 41)


@pytest.fixture
def start(
    engine: FakeEngine,
    database: Database,
    writer: GroupWriter,
    state: State,
    expected: Expected,
) -> Callable[..., Server]:
    def start(*, expected: Expected = expected, **options: Any) -> Server:
        return Server(engine, database, writer, state, expected, **options)

    return start


@pytest.fixture
async def server(start: Callable[..., Server]) -> Server:
    """Version 0 is served."""
    server = start()
    await server.swapper.step()
    return server


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


async def test_a_restart_comes_back_on_the_current_version(
    server: Server, start: Callable[..., Server], publisher: Publisher, engine: FakeEngine
):
    publisher.publish(1)
    await server.settle()
    since = server.rows()[1].state_since
    engine.loaded.clear()  # the process is gone
    again = start()
    await again.swapper.step()
    assert again.routes.current.number == 1
    assert again.states() == {0: "retired", 1: "current"}
    assert again.rows()[1].state_since == since
    assert again.held() == ["default-000001-policy", "default-000001-reward"]


async def test_a_restart_whose_version_fails_goes_back_to_the_parent(
    server: Server,
    start: Callable[..., Server],
    publisher: Publisher,
    engine: FakeEngine,
    state: State,
):
    publisher.publish(1)
    await server.settle()
    row = publisher.publish(2, 1)
    await server.settle()
    weights = state.versions / row.folder / "policy" / WEIGHTS
    weights.write_bytes(b"rotten" + weights.read_bytes())
    engine.loaded.clear()
    again = start()
    await again.settle()
    assert again.states() == {0: "retired", 1: "current", 2: "rolled_back"}
    assert again.rows()[2].reason.startswith("at start: file_altered")
    assert again.routes.current.number == 1


async def test_a_restart_falls_all_the_way_to_the_base_model_if_it_must(
    server: Server,
    start: Callable[..., Server],
    publisher: Publisher,
    engine: FakeEngine,
    state: State,
):
    for number in (1, 2):
        publisher.publish(number, number - 1)
        await server.settle()
    for row in server.rows().values():
        if row.version:
            (state.versions / row.folder / "manifest.json").write_text("{}")
    engine.loaded.clear()
    again = start()
    await again.settle()
    assert again.states() == {0: "current", 1: "rolled_back", 2: "rolled_back"}
    assert again.routes.current.number == 0


async def test_a_restart_with_an_engine_that_computes_otherwise_stops_and_takes_nothing_back(
    server: Server, start: Callable[..., Server], publisher: Publisher, engine: FakeEngine
):
    for number in (1, 2):
        publisher.publish(number, number - 1)
        await server.settle()
    before = server.states()
    engine.loaded.clear()
    engine.speaks_for["default-000002-policy"] = BASE
    again = start()
    with pytest.raises(SettingsError, match=r"version 2 is current.*attestation"):
        await again.settle()
    assert again.states() == before


async def test_a_restart_with_settings_that_do_not_fit_stops_and_takes_nothing_back(
    server: Server,
    start: Callable[..., Server],
    publisher: Publisher,
    engine: FakeEngine,
    expected: Expected,
):
    publisher.publish(1)
    await server.settle()
    engine.loaded.clear()
    narrow = start(expected=expected._replace(max_rank=1))
    with pytest.raises(SettingsError, match=r"version 1 is current.*wrong_rank.*engine\.max_rank"):
        await narrow.swapper.step()
    assert narrow.states() == {0: "retired", 1: "current"}
    again = start()
    await again.settle()
    assert again.routes.current.number == 1


async def test_a_restart_without_the_versions_folder_stops_and_takes_nothing_back(
    server: Server,
    start: Callable[..., Server],
    publisher: Publisher,
    engine: FakeEngine,
    state: State,
):
    publisher.publish(1)
    await server.settle()
    engine.loaded.clear()
    (state.versions / DEFAULT_POLICY).rename(state.versions / "unmounted")
    again = start()
    with pytest.raises(SettingsError, match="manifest_missing"):
        await again.swapper.step()
    assert again.states() == {0: "retired", 1: "current"}


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


async def test_falling_back_is_one_transaction(
    server: Server,
    start: Callable[..., Server],
    publisher: Publisher,
    engine: FakeEngine,
    state: State,
):
    """Were it two, a crash between them would leave no version current for ever."""
    row = publisher.publish(1)
    await server.settle()
    (state.versions / row.folder / "manifest.json").write_text("{}")
    engine.loaded.clear()
    again = start()
    writes = []
    run = again.writer.run

    async def count(change: Any) -> Any:
        writes.append(change)
        return await run(change)

    again.writer.run = count  # type: ignore[method-assign]
    await again.swapper.step()
    assert len(writes) == 1


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


# Operators move the pointer


def roll_back(to: int | None, expected: int) -> Move:
    return Move(to, expected, is_rollback=True, reason="it swears", actor="ann")


def promote(to: int, expected: int) -> Move:
    return Move(to, expected, is_rollback=False, reason="", actor="ann")


@pytest.fixture
async def line(server: Server, publisher: Publisher) -> Server:
    """Versions 1 and 2 have followed 0, each current in its turn."""
    for number in (1, 2):
        publisher.publish(number, number - 1)
        await server.settle()
    return server


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


async def test_another_server_follows_a_move(
    line: Server,
    tiny_model: Path,
    database: Database,
    writer: GroupWriter,
    state: State,
    expected: Expected,
):
    other = Server(FakeEngine(tiny_model), database, writer, state, expected)
    await other.settle()
    assert other.routes.current.number == 2
    await line.swapper.move(roll_back(0, 2))
    await other.settle()
    assert other.routes.current.number == 0
    await line.swapper.move(promote(2, 0))
    await other.settle(1)
    assert other.routes.current.number == 2
    assert other.routes.loaded == (0, 2)


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
    database: Database,
    writer: GroupWriter,
    state: State,
    expected: Expected,
):
    other = Server(FakeEngine(tiny_model), database, writer, state, expected)
    await other.settle()
    other.engine.speaks_for["default-000001-policy"] = BASE
    await line.swapper.move(roll_back(1, 2))
    assert not await other.swapper.step()  # to be tried again, and not at once
    assert other.routes.current.number == 2
    assert other.states() == {0: "retired", 1: "current", 2: "rolled_back"}
    del other.engine.speaks_for["default-000001-policy"]
    await other.settle()
    assert other.routes.current.number == 1


async def test_two_servers_that_start_on_a_damaged_version_both_go_back(
    line: Server,
    tiny_model: Path,
    database: Database,
    writer: GroupWriter,
    state: State,
    expected: Expected,
):
    (state.versions / line.rows()[2].folder / "manifest.json").write_text("{}")
    servers = [Server(FakeEngine(tiny_model), database, writer, state, expected) for _ in range(2)]
    await asyncio.gather(*(server.swapper.start() for server in servers))
    for server in servers:
        assert server.routes.current.number == 1
        assert server.states() == {0: "retired", 1: "current", 2: "rolled_back"}


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
    database: Database,
    writer: GroupWriter,
    state: State,
    expected: Expected,
):
    server = start(max_versions=3)
    await server.settle()
    for number in (1, 2, 3):
        publisher.publish(number, number - 1)
        await server.settle()
    await server.swapper.move(roll_back(2, 3))
    await server.swapper.move(roll_back(1, 2))
    assert len(server.routes.loaded) == 3
    other = Server(FakeEngine(tiny_model), database, writer, state, expected)
    await other.settle()
    await other.swapper.move(roll_back(0, 1))
    await server.settle()
    assert server.routes.current.number == 0
