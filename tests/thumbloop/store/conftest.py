from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, RowMapping

from thumbloop.config import State
from thumbloop.store import feedback, interactions, open_store
from thumbloop.types import Candidate


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(folder=tmp_path / "state")


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
