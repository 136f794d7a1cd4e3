"""How long a reply may be rated, over both wires."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx2
import pytest
from sqlalchemy import update

from tests.over_http import counts, web
from tests.refusals import refused
from tests.serving import Running, running
from thumbloop.client import GenerateOptions
from thumbloop.config import ServerConfig, State
from thumbloop.config.server import FeedbackSettings
from thumbloop.errors import FeedbackTooLate
from thumbloop.store import preferences, reading
from thumbloop.store.schema import interactions
from thumbloop.types import DEFAULT_POLICY
from thumbloop.v1 import feedback_pb2

DAYS = 30 * 86_400.0


@pytest.fixture
async def reply(server: Running) -> str:
    """A reply to Ann."""
    options = GenerateOptions(num_candidates=2, include_candidates=True)
    return (await server.client.generate("hello", user_id="ann", options=options)).response_id


@pytest.fixture
async def http(server: Running) -> AsyncIterator[httpx2.AsyncClient]:
    async with web(server) as client:
        yield client


def make_older(server: Running, reply: str, seconds: float) -> None:
    assert server.database is not None
    with server.database.begin() as connection:
        given = interactions.c.response_id == reply
        connection.execute(
            update(interactions).where(given).values(created_at=time.time() - seconds)
        )


def test_the_window_is_thirty_days_and_may_be_none():
    assert ServerConfig().feedback.window_s == DAYS
    assert FeedbackSettings(window_s=None).window_s is None
    with pytest.raises(ValueError, match="greater than 0"):
        FeedbackSettings(window_s=0)


async def test_a_reply_within_the_window_may_be_rated(server: Running, reply: str):
    make_older(server, reply, DAYS - 60)
    await server.client.rate(reply, up=True, user_id="ann")
    await server.client.prefer(reply, better=1, worse=0, user_id="ann")
    assert counts(server) == (1, 1)


async def test_what_comes_too_late_is_refused_and_changes_nothing(server: Running, reply: str):
    await server.client.rate(reply, up=True, user_id="ann", request_id="first")
    make_older(server, reply, DAYS + 60)
    with pytest.raises(FeedbackTooLate, match="2592000 s"):
        await server.client.rate(reply, up=False, user_id="ann")
    with pytest.raises(FeedbackTooLate):
        await server.client.prefer(reply, better=1, worse=0, user_id="ann")
    assert counts(server) == (1, 1)
    assert server.database is not None
    with reading(server.database) as connection:
        assert preferences.count(connection, DEFAULT_POLICY) == 0
    again = await server.client.rate(reply, up=True, user_id="ann", request_id="first")
    assert again.duplicate


async def test_strangers_are_not_told_that_a_reply_is_old(server: Running, reply: str):
    make_older(server, reply, DAYS + 60)
    thumb = feedback_pb2.SubmitFeedbackRequest(
        response_id=reply, thumb=feedback_pb2.THUMB_UP, user_id="bob"
    )
    error = await refused(server.feedback.SubmitFeedback(thumb))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_http_refuses_a_late_thumb_too(server: Running, http: httpx2.AsyncClient, reply: str):
    thumb = {"response_id": reply, "thumb": "up", "user": "ann"}
    make_older(server, reply, DAYS + 60)
    refusal = await http.post("/v1/feedback", json=thumb)
    assert refusal.status_code == 400
    assert "too old to be rated" in refusal.json()["error"]["message"]
    assert counts(server) == (0, 0)
    make_older(server, reply, DAYS - 60)
    assert (await http.post("/v1/feedback", json=thumb)).status_code == 200


@pytest.mark.parametrize("window_s", [None, 86_400.0])
async def test_the_setting_decides(tiny_model: Path, state: State, window_s: float | None):
    async with running(tiny_model, state, feedback={"window_s": window_s}) as server:
        reply = (await server.generate("hello", user_id="ann")).response_id
        make_older(server, reply, DAYS + 60)
        if window_s is None:
            await server.client.rate(reply, up=True, user_id="ann")
        else:
            with pytest.raises(FeedbackTooLate, match="86400 s"):
                await server.client.rate(reply, up=True, user_id="ann")


async def test_what_was_taken_counts_on_under_a_shorter_window(tiny_model: Path, state: State):
    async with running(tiny_model, state) as server:
        reply = (await server.generate("hello", user_id="ann")).response_id
        await server.client.rate(reply, up=True, user_id="ann", request_id="q")
        make_older(server, reply, 7200)
    async with running(tiny_model, state, feedback={"window_s": 3600}) as server:
        assert counts(server) == (1, 1)
        again = await server.client.rate(reply, up=True, user_id="ann", request_id="q")
        assert again.duplicate
