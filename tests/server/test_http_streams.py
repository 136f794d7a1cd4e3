"""Streams over HTTP: what is said when, what goes wrong in the middle, and callers who leave."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from server.failures import UNEXPECTED
from tests.over_http import (
    ASK,
    COMPLETE,
    JSON,
    ONE,
    WIRES,
    Body,
    Halting,
    both,
    events_of,
    head_of,
    piece_of,
    requests_of,
    rows,
    web,
)
from tests.serving import Running, running, until
from thumbloop.config import State
from thumbloop.types import Status


@pytest.fixture
async def halting(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A server whose streams halt after their first token."""
    async with running(
        tiny_model, state, make_engine=lambda model, _config: Halting(model)
    ) as server:
        yield server
        server.engine.may_go_on.set()


@both
@pytest.mark.parametrize("more", [{}, ONE], ids=["chosen of four", "alone"])
async def test_a_stream_says_what_the_whole_reply_says(
    server: Running, http: httpx2.AsyncClient, path: str, body: Body, more: Body
):
    body = {**body, **more, "seed": 11, "include_candidates": True}
    whole = (await http.post(path, json=body)).json()
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    answer = await http.post(path, json=streamed)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert {event["id"] for event in events} == {events[0]["id"]} != {whole["id"]}
    said = "".join(piece_of(event) for event in events)
    assert said == server.stored(events[0]["id"]).chosen.text
    choice = whole["choices"][0]
    assert said == choice["text" if "text" in choice else "message"] or (
        said == choice["message"]["content"]
    )
    *pieces, last, usage = events
    assert [p["choices"][0]["finish_reason"] for p in pieces] == [None] * len(pieces)
    assert last["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert last["thumbloop"] == whole["thumbloop"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


async def test_chunks_of_a_conversation_have_openais_shape(http: httpx2.AsyncClient):
    body = {**ASK, **ONE, "stream": True}
    opening, *pieces, last = events_of((await http.post("/v1/chat/completions", json=body)).text)
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert pieces
    for piece in pieces:
        assert piece["object"] == "chat.completion.chunk"
        assert set(piece["choices"][0]["delta"]) == {"content"}
        assert "usage" not in piece
    assert last["choices"][0]["delta"] == {}


@asynccontextmanager
async def first_piece(
    client: httpx2.AsyncClient, path: str, body: Body
) -> AsyncIterator[tuple[httpx2.Response, AsyncIterator[str]]]:
    """Open a stream and read up to its first text."""
    body = {**body, **ONE, "stream": True}
    async with client.stream("POST", path, json=body) as answer:
        lines = answer.aiter_lines()
        async for line in lines:
            if line and piece_of(json.loads(line.removeprefix("data: "))):
                break
        yield answer, lines


async def rest_of(lines: AsyncIterator[str]) -> list[str]:
    return [line.removeprefix("data: ") async for line in lines if line]


@both
async def test_text_comes_before_the_reply_is_complete(halting: Running, path: str, body: Body):
    async with web(halting) as client, first_piece(client, path, body) as (answer, lines):
        assert answer.status_code == 200
        assert rows(halting) == []
        halting.engine.may_go_on.set()
        assert (await rest_of(lines))[-1] == "[DONE]"
    assert rows(halting) == [Status.COMPLETED]


@both
async def test_an_error_in_the_middle_is_an_event_of_its_own(
    halting: Running, path: str, body: Body
):
    async with web(halting) as client, first_piece(client, path, body) as (answer, lines):
        halting.engine.is_dead = True
        halting.engine.may_go_on.set()
        error, done = await rest_of(lines)
    assert answer.status_code == 200
    assert json.loads(error)["error"] == {
        "message": "the engine died",
        "type": "server_error",
        "param": None,
        "code": "unavailable",
    }
    assert done == "[DONE]"


async def test_an_unexpected_error_in_the_middle_is_told_without_its_cause(
    halting: Running, caplog: pytest.LogCaptureFixture
):
    path, body = WIRES[0]
    async with web(halting) as client, first_piece(client, path, body) as (_, lines):
        halting.engine.failure = RuntimeError("the secret path /etc/passwd")
        halting.engine.may_go_on.set()
        error, done = await rest_of(lines)
    assert json.loads(error)["error"]["message"] == UNEXPECTED
    assert done == "[DONE]"
    assert "the secret path" in caplog.text


REFUSED = [
    ({"temperature": 9}, 400),
    ({"model": "gpt-4o"}, 404),
    ({"nonsense": 1}, 400),
    ({"policy_version": 7}, 404),
]


@both
@pytest.mark.parametrize(("wrong", "status"), REFUSED)
async def test_what_is_refused_before_the_stream_has_a_status(
    server: Running, http: httpx2.AsyncClient, path: str, body: Body, wrong: Body, status: int
):
    refusals = [
        await http.post(path, json={**body, **wrong, "stream": is_stream})
        for is_stream in (False, True)
    ]
    assert [refusal.status_code for refusal in refusals] == [status, status]
    assert refusals[0].json() == refusals[1].json()
    assert refusals[1].headers["content-type"] == JSON
    assert (server.engine.started, rows(server)) == (0, [])


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_engine_that_fails_before_the_first_text_has_a_status(
    server: Running, http: httpx2.AsyncClient, is_stream: bool, caplog: pytest.LogCaptureFixture
):
    body = {**COMPLETE, "stream": is_stream}
    server.engine.is_full = True
    full = await http.post("/v1/completions", json=body)
    server.engine.is_full, server.engine.is_dead = False, True
    dead = await http.post("/v1/completions", json=body)
    assert (full.status_code, dead.status_code) == (429, 503)
    assert full.json()["error"]["type"] == "rate_limit_error"
    assert full.json()["error"]["code"] == "resource_exhausted"
    assert dead.json()["error"]["type"] == "server_error"
    assert {record.name for record in caplog.records} <= {"server.supervision"}  # it may have heard


# Callers who leave


@both
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_caller_who_hangs_up_before_the_reply_aborts_its_samples(
    server: Running, path: str, body: Body, is_stream: bool
):
    server.engine.may_sample.clear()
    async with web(server) as client:
        call = asyncio.create_task(client.post(path, json={**body, "stream": is_stream}))
        await server.sampling(4)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await until(lambda: server.engine.aborted == 4)
    await until(lambda: rows(server) == [Status.CANCELLED])
    assert await requests_of(server) == {(f"POST {path}", "499"): 1}


@both
async def test_a_caller_who_hangs_up_in_the_middle_of_a_stream_aborts_its_sample(
    halting: Running, path: str, body: Body, caplog: pytest.LogCaptureFixture
):
    async with web(halting) as client, first_piece(client, path, body):
        assert halting.engine.streaming == 1
    await until(lambda: halting.engine.streaming == 0)
    await until(lambda: rows(halting) == [Status.CANCELLED])
    assert caplog.records == []


async def test_a_caller_who_hangs_up_before_its_body_is_there_is_no_error(
    server: Running, http: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
):
    _, writer = await asyncio.open_connection("127.0.0.1", server.application.http_port)
    writer.write(head_of(100) + b"{")
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await writer.wait_closed()
    key = ("POST /v1/completions", "499")
    async with asyncio.timeout(10):
        while key not in await requests_of(server):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert caplog.records == []
    assert (await http.post("/v1/completions", json=COMPLETE)).status_code == 200
