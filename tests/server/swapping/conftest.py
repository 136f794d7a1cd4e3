"""A swapper on a fake engine, and three versions of a line."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine as Database

from server.verification import Expected
from tests.fakes import FakeEngine
from tests.publishing import Publisher
from tests.swapping import Server
from thumbloop.config import State
from thumbloop.store import GroupWriter


@pytest.fixture
def start(
    engine: FakeEngine,
    database: Database,
    writer: GroupWriter,
    state: State,
    expected: Expected,
) -> Callable[..., Server]:
    def start(
        *, engine: FakeEngine = engine, expected: Expected = expected, **options: Any
    ) -> Server:
        return Server(engine, database, writer, state, expected, **options)

    return start


@pytest.fixture
async def server(start: Callable[..., Server]) -> Server:
    """Version 0 is served."""
    server = start()
    await server.swapper.step()
    return server


@pytest.fixture
async def line(server: Server, publisher: Publisher) -> Server:
    """Versions 1 and 2 have followed 0, each current in its turn."""
    for number in (1, 2):
        publisher.publish(number, number - 1)
        await server.settle()
    return server
