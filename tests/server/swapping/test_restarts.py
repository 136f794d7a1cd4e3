"""A server that starts takes up what answered before, or what came before that."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.verification import Expected
from tests.fakes import BASE, FakeEngine
from tests.publishing import Publisher
from tests.swapping import Server
from thumbloop.artifacts import WEIGHTS
from thumbloop.config import State
from thumbloop.errors import SettingsError
from thumbloop.types import DEFAULT_POLICY


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


async def test_two_servers_that_start_on_a_damaged_version_both_go_back(
    line: Server,
    tiny_model: Path,
    start: Callable[..., Server],
    state: State,
):
    (state.versions / line.rows()[2].folder / "manifest.json").write_text("{}")
    servers = [start(engine=FakeEngine(tiny_model)) for _ in range(2)]
    await asyncio.gather(*(server.swapper.start() for server in servers))
    for server in servers:
        assert server.routes.current.number == 1
        assert server.states() == {0: "retired", 1: "current", 2: "rolled_back"}
