from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.examples.runs import Run, runner
from tests.serving import Running, running
from thumbloop.config import State


@pytest.fixture
async def server(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tiny_model, State(folder=tmp_path / "state")) as server:
        yield server


@pytest.fixture
def run(server: Running) -> Run:
    return runner(server)
