from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, RowMapping

from thumbloop.config import State
from thumbloop.store import feedback, interactions, open_store
from thumbloop.types import Candidate


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what needs a store with either database, but for what is about SQLite alone."""
    if "state" in metafunc.fixturenames:
        is_of_sqlite = metafunc.definition.get_closest_marker("sqlite")
        databases = ["sqlite"] if is_of_sqlite else ["sqlite", "postgresql"]
        metafunc.parametrize("state", databases, indirect=True)


@pytest.fixture
def state(request: pytest.FixtureRequest, tmp_path: Path) -> State:
    """Where a store is."""
    is_sqlite = request.param == "sqlite"
    url = None if is_sqlite else request.getfixturevalue("postgresql").new_database()
    return State(folder=tmp_path / "state", url=url)


@pytest.fixture
def store(state: State) -> Iterator[Engine]:
    engine = open_store(state)
    yield engine
    engine.dispose()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The replies whose candidates were read, in their order."""
    read: list[str] = []
    candidate_of = interactions.candidate_of

    def noted(row: RowMapping) -> Candidate:
        read.append(row["response_id"])
        return candidate_of(row)

    for module in (interactions, feedback):
        monkeypatch.setattr(module, "candidate_of", noted)
    return read
