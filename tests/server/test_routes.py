import asyncio

import pytest

from server.engine import Adapter
from server.routes import LoadedVersion, Routes
from tests.rows import version
from thumbloop.errors import EngineUnavailable, PolicyVersionUnavailable, UnknownPolicyVersion


def loaded(number: int) -> LoadedVersion:
    return LoadedVersion(version(number), Adapter(f"v{number}", number, f"f{number}"), None)


@pytest.fixture
def routes() -> Routes:
    """Versions 0, 1 and 2 are loaded, 1 is current."""
    routes = Routes()
    for number in range(3):
        routes.add(loaded(number))
    routes.switch(1)
    routes.know(3)
    return routes


def test_nothing_answers_before_the_first_version():
    routes = Routes()
    assert routes.loaded == ()
    assert routes.current_or_nan() != routes.current_or_nan()
    with pytest.raises(EngineUnavailable, match="starting"), routes.hold():
        pass


def test_requests_go_to_the_current_version_or_to_the_pinned_one(routes: Routes):
    with routes.hold() as now, routes.hold(2) as pinned:
        assert (now.number, pinned.number) == (1, 2)
    assert routes.loaded == (0, 1, 2)
    assert routes.current_or_nan() == 1


def test_a_switch_moves_new_requests_only(routes: Routes):
    with routes.hold() as before:
        routes.switch(2)
        with routes.hold() as after:
            assert (before.number, after.number) == (1, 2)
            assert (routes.in_flight(1), routes.in_flight(2)) == (1, 1)
    assert (routes.in_flight(1), routes.in_flight(2)) == (0, 0)


def test_only_loaded_versions_can_be_switched_to(routes: Routes):
    with pytest.raises(KeyError):
        routes.switch(7)
    assert routes.current.number == 1


@pytest.mark.parametrize("number", [0, 3], ids=["unloaded", "rejected or still to come"])
def test_a_pin_to_a_version_that_is_not_loaded_is_refused(routes: Routes, number: int):
    routes.remove(0)
    with (
        pytest.raises(PolicyVersionUnavailable, match=f"{number} is not loaded; available: 1, 2"),
        routes.hold(number),
    ):
        pass


def test_a_pin_to_a_version_that_never_was_is_refused_as_unknown(routes: Routes):
    with pytest.raises(UnknownPolicyVersion, match="no version 4; available"), routes.hold(4):
        pass


def test_the_current_version_is_never_removed(routes: Routes):
    with pytest.raises(AssertionError):
        routes.remove(1)


def test_a_failed_request_lets_its_version_go(routes: Routes):
    with pytest.raises(ZeroDivisionError), routes.hold():
        raise ZeroDivisionError
    assert routes.in_flight(1) == 0


async def test_draining_waits_for_the_last_request_even_of_a_version_out_of_reach(routes: Routes):
    with routes.hold(0):
        routes.remove(0)
        assert not await routes.drain(0, 0.02)
        draining = asyncio.create_task(routes.drain(0, 5))
        await asyncio.sleep(0.02)
        assert not draining.done()
    assert await draining


async def test_an_idle_version_has_drained_at_once(routes: Routes):
    assert await routes.drain(2, 0.0)
    assert await routes.drain(99, 0.0)
