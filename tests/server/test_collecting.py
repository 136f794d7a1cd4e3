"""Folders that nobody needs are deleted from the disk, of a real store, and nothing else is."""

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine as Database

from experiments.consistency import look
from server import collecting
from server.collecting import Collector
from server.delivery import Move
from server.origins import lineage_of
from server.verification import Expected
from tests.fakes import FakeEngine
from tests.publishing import FakeSpeaker, Publisher
from tests.swapping import Server
from thumbloop import artifacts
from thumbloop.base_model import claim_base, identify
from thumbloop.config import State, Verdict
from thumbloop.errors import PolicyVersionUnavailable, StoreUnavailable, VersionConflict
from thumbloop.leases import hold
from thumbloop.rendering import verdict_tokens
from thumbloop.store import GroupWriter, deployments, open_store, reading
from thumbloop.types import DEFAULT_POLICY, VersionState

NUMBERS = range(1, 7)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A state folder in which versions 1 to 6 were current, each in its turn."""
    state, engine = State(folder=tmp_path_factory.mktemp("served")), FakeEngine(tiny_model)
    claim_base(state.versions, DEFAULT_POLICY, identify(tiny_model), 1.0)
    database, verdict = open_store(state), verdict_tokens(Verdict(), engine.tokenizer)
    publisher = Publisher(tiny_model, state.versions, database, verdict, FakeSpeaker(engine))
    for number in NUMBERS:
        publisher.publish(number, number - 1)
        with database.begin() as connection:
            current, at = VersionState.CURRENT, time.time()
            deployments.set_state(connection, DEFAULT_POLICY, number, current, at=at)
    database.dispose()
    return state.folder


@pytest.fixture
def state(tmp_path: Path, served: Path) -> State:
    return State(folder=shutil.copytree(served, tmp_path / "state"))


@pytest.fixture
def start(
    engine: FakeEngine, database: Database, writer: GroupWriter, state: State, expected: Expected
) -> Callable[..., Server]:
    def start(**options: Any) -> Server:
        return Server(engine, database, writer, state, expected, max_versions=3, **options)

    return start


@pytest.fixture
async def server(start: Callable[..., Server]) -> Server:
    """It holds version 6."""
    server = start()
    await server.swapper.start()
    assert server.routes.loaded == (6,)
    return server


class Bin:
    """A collector of a server, and what it deleted."""

    def __init__(self, server: Server, state: State, keep: int = 2) -> None:
        self.sizes: list[int] = []
        self._folder = state.versions / DEFAULT_POLICY
        self.collector = Collector(
            server.ledger,
            lambda: server.loader.held,
            state.versions,
            keep,
            on_collected=self.sizes.append,
        )

    async def empty(self) -> list[str]:
        """Collect; return what is in the folder of versions then."""
        await self.collector.collect()
        return sorted(path.name for path in self._folder.iterdir())


@pytest.fixture
def bin_(server: Server, state: State) -> Bin:
    return Bin(server, state)


def names(*numbers: int) -> list[str]:
    return [f"{number:06d}" for number in numbers]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


async def test_all_but_the_last_ones_are_deleted_and_stay_so(
    server: Server, bin_: Bin, database: Database, state: State
):
    sizes = [_size(state.versions / f"default/00000{number}") for number in (1, 2, 3)]
    assert await bin_.empty() == names(0, 4, 5, 6)
    assert bin_.sizes == sizes
    assert await bin_.empty() == names(0, 4, 5, 6)
    assert len(bin_.sizes) == 3
    rows = server.rows()
    assert [n for n, row in rows.items() if row.collected_at is not None] == [1, 2, 3]
    assert {row.state.value for n, row in rows.items() if n < 6} == {"retired"}
    with reading(database) as connection:
        event = deployments.list_events(connection, DEFAULT_POLICY, 1)[-1]
    assert (event["kind"], event["actor"]) == ("collected", "server")
    assert event["detail"]["reason"] == "its folder is deleted: delivery.keep_versions is 2"


async def test_the_settings_of_a_version_outlive_its_folder(
    server: Server, bin_: Bin, database: Database, state: State
):
    def settings() -> str:
        with reading(database) as connection:
            rows = [*server.rows().values()]
            return lineage_of(connection, rows, rows[1], state.versions).settings_json

    before = settings()
    assert before
    await bin_.empty()
    assert not (state.versions / "default/000001").exists()
    assert settings() == before


async def test_a_state_folder_with_deleted_versions_is_sound(
    server: Server, bin_: Bin, state: State
):
    await bin_.empty()
    found = look(state.folder)
    assert [words for words in found.wrong if "folder" in words or "verify" in words] == []
    assert found.leftovers == []


async def test_what_was_deleted_is_neither_promoted_nor_gone_back_to(server: Server, bin_: Bin):
    await bin_.empty()
    for is_rollback in (True, False):
        with pytest.raises(
            PolicyVersionUnavailable, match=r"version 2 is retired, and its folder was deleted"
        ):
            await server.swapper.move(Move(2, 6, is_rollback=is_rollback, reason="", actor=""))
    assert (
        await server.swapper.move(Move(4, 6, is_rollback=True, reason="", actor=""))
    ).version == 4
    # Its parent, 3, is gone: what served before is not compared with it again, and 0 is the way back.
    moved = await server.swapper.move(Move(None, 4, is_rollback=True, reason="", actor=""))
    assert moved.version == 0


async def test_a_restart_needs_no_folder_that_was_deleted(
    server: Server, bin_: Bin, start: Callable[..., Server], engine: FakeEngine
):
    assert await bin_.empty() == names(0, 4, 5, 6)
    await server.swapper.move(Move(4, 6, is_rollback=True, reason="", actor=""))
    engine.loaded.clear()
    again = start()
    await again.swapper.start()
    assert again.routes.current.number == 4


async def test_a_restart_on_a_damaged_version_goes_back_to_one_that_is_there(
    server: Server, bin_: Bin, start: Callable[..., Server], engine: FakeEngine, state: State
):
    """Version 4's parent was deleted; 0 is the nearest ancestor that is there."""
    await bin_.empty()
    await server.swapper.move(Move(4, 6, is_rollback=True, reason="", actor=""))
    (state.versions / "default/000004/manifest.json").write_text("{}")
    engine.loaded.clear()
    again = start()
    await again.swapper.start()
    assert again.routes.current.number == 0
    assert again.states()[4] == "rolled_back"


async def test_what_another_process_uses_stays_until_it_lets_go(
    server: Server, bin_: Bin, state: State
):
    """A trainer's parent, or what another server has loaded: their locks say so."""
    with hold(state.versions / "default/000002"):
        assert await bin_.empty() == names(0, 2, 4, 5, 6)
        assert server.rows()[2].collected_at is None
    assert await bin_.empty() == names(0, 4, 5, 6)


async def test_what_another_server_has_loaded_stays(
    server: Server,
    bin_: Bin,
    tiny_model: Path,
    database: Database,
    writer: GroupWriter,
    state: State,
    expected: Expected,
):
    other = Server(FakeEngine(tiny_model), database, writer, state, expected, max_versions=5)
    await other.settle()
    await other.swapper.move(Move(1, 6, is_rollback=True, reason="", actor=""))
    await other.swapper.move(Move(2, 1, is_rollback=False, reason="", actor=""))
    await other.swapper.move(Move(6, 2, is_rollback=False, reason="", actor=""))
    assert other.routes.loaded == (1, 2, 6)
    await server.settle(8)
    assert server.loader.held == {6}
    assert await Bin(server, state, keep=1).empty() == names(0, 1, 2, 5, 6)
    with other.routes.hold(1):
        pass
    await other.loader.unload(other.routes.remove(1))
    assert await Bin(server, state, keep=1).empty() == names(0, 2, 5, 6)


async def test_what_this_server_drains_stays_until_its_last_request_is_done(
    server: Server, bin_: Bin, state: State, publisher: Publisher
):
    with server.routes.hold():
        for number in (7, 8):
            publisher.publish(number, number - 1)
            await server.settle()
        assert 6 in server.loader.held
        assert await Bin(server, state, keep=1).empty() == names(0, 6, 7, 8)
    await server.settle()
    assert server.loader.held == {8}
    assert await Bin(server, state, keep=1).empty() == names(0, 7, 8)


async def test_what_failed_leaves_no_lock_behind(
    server: Server, state: State, publisher: Publisher
):
    publisher.publish(7, 6)
    server.engine.speaks_for["default-000007-policy"] = "something else"
    await server.settle()
    assert server.states()[7] == "rejected"
    assert server.loader.held == {6}
    assert await Bin(server, state, keep=1).empty() == names(0, 5, 6)


async def test_what_came_to_be_needed_since_the_look_stays(
    server: Server, bin_: Bin, database: Database
):
    """By a server whose locks are not seen here; the store says so, in the transaction of the mark."""
    run = server.writer.run

    async def move_first(change: Any) -> Any:
        server.writer.run = run  # type: ignore[method-assign]
        with database.begin() as connection:
            deployments.make_current(
                connection,
                DEFAULT_POLICY,
                3,
                expected=6,
                leaves_as=VersionState.RETIRED,
                at=time.time(),
                reason="",
            )
        return await run(change)

    server.writer.run = move_first  # type: ignore[method-assign]
    assert await bin_.empty() == names(
        0, 2, 3, 4, 5, 6
    )  # 1, 2 and 3 were to go; 2 is the way back now
    assert await bin_.empty() == names(0, 2, 3, 5, 6)


async def test_what_was_deleted_is_not_made_current_by_who_did_not_know(
    server: Server, bin_: Bin, database: Database
):
    await bin_.empty()
    with (
        pytest.raises(VersionConflict, match="the folder of version 2 was deleted meanwhile"),
        database.begin() as connection,
    ):
        deployments.make_current(
            connection,
            DEFAULT_POLICY,
            2,
            expected=6,
            leaves_as=VersionState.RETIRED,
            at=time.time(),
            reason="",
        )
    assert server.states()[6] == "current"


async def test_a_crash_before_the_folder_is_moved_is_made_good(
    server: Server, bin_: Bin, state: State, monkeypatch: pytest.MonkeyPatch
):
    def die(*_arguments: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "set_aside", die)
        with pytest.raises(KeyboardInterrupt):
            await bin_.empty()
    assert server.rows()[1].collected_at is not None
    assert (
        state.versions / "default/000001/manifest.json"
    ).exists()  # whole, and never served again
    assert look(state.folder).leftovers == []
    assert await bin_.empty() == names(0, 4, 5, 6)


async def test_a_crash_in_the_middle_of_a_deletion_is_made_good_and_nobody_sees_half_a_folder(
    server: Server, bin_: Bin, state: State, monkeypatch: pytest.MonkeyPatch
):
    def die(folder: Path, **_options: object) -> None:
        (folder / "policy" / "adapter_config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(artifacts.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            await bin_.empty()
    assert not (state.versions / "default/000001").exists()
    assert (state.versions / "default/.000001.collected").exists()
    assert look(state.folder).leftovers == [".000001.collected is there, and no row names it"]
    assert await bin_.empty() == names(0, 4, 5, 6)


async def test_what_a_crash_left_goes_though_nothing_else_does(
    server: Server, bin_: Bin, database: Database, state: State
):
    with database.begin() as connection:
        deployments.collect(connection, DEFAULT_POLICY, 1, at=1.0, reason="")
    artifacts.set_aside(state.versions, DEFAULT_POLICY, 1)
    assert await Bin(server, state, keep=9).empty() == names(0, 2, 3, 4, 5, 6)


async def test_a_store_that_takes_no_write_costs_no_folder(server: Server, bin_: Bin, state: State):
    async def fail(_change: Any) -> Any:
        raise StoreUnavailable("locked")

    run, server.writer.run = server.writer.run, fail  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable):
        await bin_.empty()
    server.writer.run = run  # type: ignore[method-assign]
    assert [v for v in server.rows().values() if v.collected_at is not None] == []
    assert await bin_.empty() == names(0, 4, 5, 6)


async def test_a_folder_that_does_not_go_is_reported_and_tried_again(
    server: Server, bin_: Bin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "set_aside", fail)
        assert await bin_.empty() == names(*range(7))
    assert "the folder of version 1 cannot be deleted" in caplog.text
    assert bin_.sizes == []
    assert await bin_.empty() == names(0, 4, 5, 6)


async def test_a_folder_that_was_gone_before_is_marked_and_nothing_else_happens(
    server: Server, bin_: Bin, state: State
):
    artifacts.set_aside(state.versions, DEFAULT_POLICY, 1)
    assert await bin_.empty() == names(0, 4, 5, 6)
    assert server.rows()[1].collected_at is not None


async def test_two_servers_collect_at_once_and_each_folder_goes_once(
    server: Server, bin_: Bin, state: State
):
    other = Bin(server, state)
    await asyncio.gather(bin_.empty(), other.empty())
    assert await bin_.empty() == names(0, 4, 5, 6)
    assert len(bin_.sizes) + len(other.sizes) == 3


async def test_watching_goes_on_where_the_store_does_not_answer(
    server: Server, state: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(collecting, "_INTERVAL_S", 0.01)
    found, rows, is_first = Bin(server, state), server.ledger.rows, True

    async def fail_first() -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            raise StoreUnavailable("locked")
        return await rows()

    server.ledger.rows = fail_first  # type: ignore[method-assign]
    watching = asyncio.create_task(found.collector.watch())
    async with asyncio.timeout(10):
        while len(found.sizes) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    watching.cancel()
    assert "locked; trying again" in caplog.text
