from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from tests.browsing import Rater, chromium, page_of, rating
from tests.fakes import FakeEngine
from tests.publishing import Publisher, publisher_of
from tests.serving import Running, running
from thumbloop.config import State


@pytest_asyncio.fixture(loop_scope="session")
async def server(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    async with running(tiny_model, state) as server:
        yield server


@pytest.fixture
def publisher(tiny_model: Path, state: State, server: Running) -> Publisher:
    assert isinstance(server.engine, FakeEngine)
    return publisher_of(server, tiny_model, state)


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def address(server: Running) -> AsyncIterator[str]:
    """Where the page is."""
    async with page_of(server) as address:
        yield address


@pytest_asyncio.fixture(loop_scope="session")
async def rater(browser: Browser, address: str) -> AsyncIterator[Rater]:
    """Ann, who has opened the page."""
    async with rating(browser, address) as rater:
        await rater.open("?user=ann")
        yield rater
