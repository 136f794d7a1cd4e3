"""A server with a reward model."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.publishing import publisher_of
from tests.serving import Running, running
from thumbloop.config import State


@pytest.fixture
async def taught(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A server whose current version is 1, so that there is a reward model."""
    async with running(tiny_model, state) as server:
        publisher_of(server, tiny_model, state).publish(1)
        await server.serves(1)
        yield server
