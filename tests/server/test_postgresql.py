"""A whole server whose store is in PostgreSQL."""

from pathlib import Path

import pytest

from tests.postgresql import Cluster
from tests.publishing import Publisher
from tests.serving import Running, running
from thumbloop.client import GenerateOptions
from thumbloop.config import State
from thumbloop.errors import NotFound
from thumbloop.store import feedback, preferences, reading
from thumbloop.types import DEFAULT_POLICY

TWO = GenerateOptions(num_candidates=2, include_candidates=True)


@pytest.fixture
def state(tmp_path: Path, postgresql: Cluster) -> State:
    return State(folder=tmp_path / "state", url=postgresql.new_database())


async def test_people_are_answered_rate_and_are_forgotten(server: Running):
    ask = {"user_id": "ann", "request_id": "q", "options": TWO}
    reply = await server.client.generate("hello", **ask)
    assert (await server.client.generate("hello", **ask)).response_id == reply.response_id
    await server.client.rate(reply.response_id, up=False, user_id="ann", comment="why?")
    await server.client.rate(reply.response_id, up=True, user_id="ann")
    await server.client.prefer(reply.response_id, better=1, worse=0, user_id="ann")
    assert server.database is not None
    with reading(server.database) as connection:
        (rated,) = feedback.list_rated(connection, DEFAULT_POLICY)
        assert (rated.value, feedback.counts(connection)) == (1, (2, 1))
        assert preferences.count(connection, DEFAULT_POLICY) == 1
    erased = await server.client.forget("ann")
    assert (erased.interactions_erased, erased.feedback_erased) == (1, 3)
    with pytest.raises(NotFound):
        await server.client.rate(reply.response_id, up=True, user_id="ann")


async def test_versions_come_and_go_back_and_outlive_the_server(
    tiny_model: Path, state: State, publisher: Publisher
):
    async with running(tiny_model, state) as server:
        publisher.publish(1)
        await server.serves(1)
        publisher.publish(2, parent=1)
        await server.serves(2)
        await server.client.roll_back(expected_current=2, reason="it swears")
        assert (await server.client.versions()).current_version == 1
    async with running(tiny_model, state) as server:
        assert (await server.client.generate("hello")).policy_version == 1


async def test_a_server_goes_on_once_the_database_is_back(server: Running, postgresql: Cluster):
    reply = await server.client.generate("hello", user_id="ann")
    postgresql.break_connections()
    await server.client.rate(reply.response_id, up=True, user_id="ann")
    assert (await server.client.generate("hello")).text
    assert (await server.client.versions()).current_version == 0
