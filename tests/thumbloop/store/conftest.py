from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from thumbloop.config import State
from thumbloop.store import open_store


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(folder=tmp_path / "state")


@pytest.fixture
def store(state: State) -> Iterator[Engine]:
    engine = open_store(state)
    yield engine
    engine.dispose()
