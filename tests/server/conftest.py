from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import Engine as Database

from server.verification import Expected
from tests.fakes import FakeEngine
from tests.over_http import web
from tests.publishing import FakeSpeaker, Publisher
from tests.serving import Running, running
from thumbloop.base_model import identify
from thumbloop.config import State, Verdict
from thumbloop.rendering import VerdictTokens, verdict_tokens
from thumbloop.store import GroupWriter, open_store


@pytest.fixture
def engine(tiny_model: Path) -> FakeEngine:
    return FakeEngine(tiny_model)


@pytest.fixture
def database(state: State) -> Iterator[Database]:
    database = open_store(state)
    yield database
    database.dispose()


@pytest.fixture
def writer(database: Database) -> Iterator[GroupWriter]:
    writer = GroupWriter(database)
    yield writer
    writer.close()


@pytest.fixture
def verdict(engine: FakeEngine) -> VerdictTokens:
    return verdict_tokens(Verdict(), engine.tokenizer)


@pytest.fixture
def expected(tiny_model: Path, engine: FakeEngine, verdict: VerdictTokens) -> Expected:
    return Expected(identify(tiny_model), verdict, engine.lora_shapes, 16)


@pytest.fixture
def publisher(
    tiny_model: Path,
    state: State,
    database: Database,
    verdict: VerdictTokens,
    engine: FakeEngine,
) -> Publisher:
    """Publishes versions whose probes are what the fake engine will say."""
    return Publisher(tiny_model, state.versions, database, verdict, FakeSpeaker(engine))


@pytest.fixture
async def server(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A whole server on a fake engine, with version 0."""
    async with running(tiny_model, state) as server:
        yield server


@pytest.fixture
async def http(server: Running) -> AsyncIterator[httpx2.AsyncClient]:
    async with web(server) as client:
        yield client
