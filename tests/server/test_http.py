"""The OpenAI-compatible port: what is answered, streamed, given up, and stored."""

import asyncio
import json
import socket
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.application import Application
from server.failures import UNEXPECTED
from tests.fakes import FakeEngine
from tests.over_http import (
    ASK,
    COMPLETE,
    JSON,
    ONE,
    WIRES,
    Body,
    Halting,
    both,
    counts,
    head_of,
    rows,
    web,
)
from tests.serving import Running, config_of, running, until
from thumbloop.config import State
from thumbloop.errors import SettingsError
from thumbloop.store import feedback, reading
from thumbloop.types import (
    DEFAULT_POLICY,
    Learning,
    Message,
    Prompt,
    Role,
    Sampling,
    Status,
    Strategy,
    User,
)
from thumbloop.v1 import policy_pb2


@pytest.fixture
async def halting(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A server whose streams halt after their first token."""
    async with running(
        tiny_model, state, make_engine=lambda model, _config: Halting(model)
    ) as server:
        yield server
        server.engine.may_go_on.set()


def events_of(text: str) -> list[Any]:
    """Return the data of a whole stream's events; the last one has to be [DONE]."""
    *events, rest = text.split("\n\n")
    assert rest == ""
    data = [event.removeprefix("data: ") for event in events]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


def piece_of(event: Body) -> str:
    """Return the text in an event of a stream, of either kind of completion."""
    return "".join(c.get("text") or c.get("delta", {}).get("content", "") for c in event["choices"])


async def requests_of(server: Running) -> dict[tuple[str, str], float]:
    """Return what Prometheus scrapes: how many requests of a route had a status."""
    url = f"http://127.0.0.1:{server.application.metrics_port}/metrics"

    def scrape() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    return {
        (sample.labels["route"], sample.labels["code"]): sample.value
        for family in text_string_to_metric_families(await asyncio.to_thread(scrape))
        for sample in family.samples
        if sample.name == "thumbloop_http_requests_total" and sample.value
    }


# Answers


async def test_the_models_are_the_policy_and_the_policy_under_each_strategy(
    http: httpx2.AsyncClient,
):
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    names = [DEFAULT_POLICY, *(f"{DEFAULT_POLICY}:{strategy}" for strategy in sorted(Strategy))]
    assert [model["id"] for model in listed["data"]] == names
    assert {model["object"] for model in listed["data"]} == {"model"}


async def test_a_conversation_is_answered_and_stored(server: Running, http: httpx2.AsyncClient):
    body = {
        "model": "default",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("How ", "was it?")]},
            {"role": "assistant", "content": "Good."},
            {"role": "user", "content": "And the <|up|> food?"},
        ],
        "user": "ann",
        "session_id": "s",
    }
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    reply = answer.json()
    stored = server.stored(reply["id"])
    assert stored.prompt == Prompt(
        messages=(
            Message(Role.SYSTEM, "Be brief."),
            Message(Role.SYSTEM, "Be kind."),
            Message(Role.USER, "How was it?"),
            Message(Role.ASSISTANT, "Good."),
            Message(Role.USER, "And the <|up|> food?"),
        )
    )
    assert (stored.user, stored.session_id) == (User("", "ann"), "s")
    assert (reply["object"], reply["model"]) == ("chat.completion", "default")
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": stored.chosen.text}
    assert (choice["index"], choice["logprobs"]) == (0, None)
    prompt, chosen = len(stored.prompt_token_ids), len(stored.chosen.token_ids)
    assert reply["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": chosen,
        "total_tokens": prompt + chosen,
    }
    beside = reply["thumbloop"]
    assert beside["candidate_tokens"] == sum(len(c.token_ids) for c in stored.candidates)
    assert (beside["policy_version"], beside["num_candidates"]) == (0, 4)
    assert (beside["reward"], beside["reranked"], beside["candidates"]) == (None, False, [])


async def test_a_text_is_continued_and_stored(server: Running, http: httpx2.AsyncClient):
    body = {**COMPLETE, "include_candidates": True, "seed": 3, **ONE}
    reply = (await http.post("/v1/completions", json=body)).json()
    stored = server.stored(reply["id"])
    assert stored.prompt == Prompt(text="The soup was")
    assert reply["object"] == "text_completion"
    (choice,) = reply["choices"]
    assert choice["text"] == stored.chosen.text
    assert choice["finish_reason"] == stored.chosen.finish_reason.value
    (candidate,) = reply["thumbloop"]["candidates"]
    assert candidate["text"] == stored.chosen.text


@both
async def test_the_same_request_gives_the_same_reply_over_both_wires(
    server: Running, http: httpx2.AsyncClient, path: str, body: Body
):
    over_http = (await http.post(path, json={**body, "seed": 7})).json()
    stored = server.stored(over_http["id"])
    request = policy_pb2.GenerateRequest(sampling=policy_pb2.SamplingParams(seed=7))
    if "prompt" in body:
        request.text = body["prompt"]
    else:
        request.chat.messages.add(role=policy_pb2.ROLE_USER, content="How was it?")
    over_grpc = server.stored((await server.policy.Generate(request)).response_id)
    assert (over_grpc.prompt, over_grpc.sampling) == (stored.prompt, stored.sampling)
    assert over_grpc.chosen == stored.chosen


async def test_openais_fields_and_ours_are_heard(server: Running, http: httpx2.AsyncClient):
    body = {
        **ASK,
        "model": "default:best_of_n",
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 2**64 - 1,
        "stop": ["zz", "yy"],
        "n": 1,
        "top_k": 5,
        "guidance": {"num_candidates": 3, "temperature": 2.0},
        "learning": "excluded",
        "policy_version": 0,
        "request_id": "q",
    }
    reply = (await http.post("/v1/chat/completions", json=body)).json()
    stored = server.stored(reply["id"])
    assert stored.sampling == Sampling(9, 0.5, 0.9, 5, 2**64 - 1, ("zz", "yy"))
    assert stored.strategy == Strategy.BEST_OF_N
    assert len(stored.candidates) == 3
    assert stored.learning is Learning.EXCLUDED
    assert stored.request_id == "q"
    single = (await http.post("/v1/completions", json={**COMPLETE, "stop": "z"})).json()
    assert server.stored(single["id"]).sampling.stop == ("z",)


async def test_how_a_reply_ended_is_said_in_openais_words(http: httpx2.AsyncClient):
    reasons = set()
    for seed in range(20):
        body = {**COMPLETE, **ONE, "seed": seed}
        reply = (await http.post("/v1/completions", json=body)).json()
        is_short = reply["usage"]["completion_tokens"] < 16
        reason = reply["choices"][0]["finish_reason"]
        assert reason == "stop" or not is_short
        reasons.add(reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize(
    ("said", "strategy"),
    [
        ({"model": "default"}, Strategy.SOFT_BEST_OF_N),
        ({}, Strategy.SOFT_BEST_OF_N),
        ({"model": "default:none"}, Strategy.NONE),
        ({"model": "default:speculative_rejection"}, Strategy.SPECULATIVE_REJECTION),
        ({"guidance": {"strategy": "best_of_n"}}, Strategy.BEST_OF_N),
    ],
)
async def test_the_models_name_or_guidance_says_the_strategy(
    server: Running, http: httpx2.AsyncClient, said: Body, strategy: Strategy
):
    reply = (await http.post("/v1/chat/completions", json={**ASK, **said})).json()
    assert server.stored(reply["id"]).strategy == strategy
    assert reply["model"] == said.get("model", "default")


# Streams


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


async def test_who_comes_too_often_is_told_when_to_come_back(tiny_model: Path, state: State):
    async with (
        running(tiny_model, state, quotas={"per_user": "4/hour"}) as server,
        web(server) as client,
    ):
        assert (await client.post("/v1/completions", json=COMPLETE)).status_code == 200
        refusal = await client.post("/v1/completions", json=COMPLETE)
    assert refusal.status_code == 429
    seconds = refusal.headers["retry-after"]
    assert seconds.isdecimal()  # clients take no fractions here
    assert 0 < int(seconds) <= 3601
    exactly_s = float(refusal.headers["retry-after-ms"]) / 1000
    assert int(seconds) - 1 <= exactly_s <= int(seconds)


async def test_a_short_wait_is_told_in_milliseconds_too(server: Running, http: httpx2.AsyncClient):
    server.engine.is_full = True
    headers = (await http.post("/v1/completions", json=COMPLETE)).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("1", "250")


# Retries


@both
@pytest.mark.parametrize("how", ["field", "header"])
async def test_a_repeated_request_gets_the_same_reply(
    server: Running, http: httpx2.AsyncClient, path: str, body: Body, how: str
):
    headers = {"idempotency-key": "q"} if how == "header" else {}
    body = {**body, "request_id": "q"} if how == "field" else body
    first, second = [(await http.post(path, json=body, headers=headers)).json() for _ in range(2)]
    assert (first["id"], first["choices"]) == (second["id"], second["choices"])
    streamed = await http.post(path, json={**body, "stream": True}, headers=headers)
    events = events_of(streamed.text)
    assert {event["id"] for event in events} == {first["id"]}
    said = first["choices"][0].get("text") or first["choices"][0]["message"]["content"]
    assert "".join(piece_of(event) for event in events) == said
    other = await http.post(path, json={**body, "max_tokens": 3}, headers=headers)
    assert other.status_code == 409
    assert rows(server) == [Status.COMPLETED]


async def test_requests_of_one_key_that_arrive_together_are_answered_once(
    server: Running, http: httpx2.AsyncClient
):
    server.engine.may_sample.clear()
    calls = [
        asyncio.create_task(
            http.post("/v1/completions", json=COMPLETE, headers={"idempotency-key": "q"})
        )
        for _ in range(5)
    ]
    await server.sampling(4)
    server.engine.may_sample.set()
    answers = [answer.json()["id"] for answer in await asyncio.gather(*calls)]
    assert len(set(answers)) == 1
    assert server.engine.started == 4


async def test_the_field_names_the_request_where_there_is_a_header_too(
    server: Running, http: httpx2.AsyncClient
):
    body = {**COMPLETE, "request_id": "field"}
    reply = await http.post("/v1/completions", json=body, headers={"idempotency-key": "header"})
    assert server.stored(reply.json()["id"]).request_id == "field"


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


# Thumbs


async def test_a_thumb_is_stored_for_the_reply_and_its_user(
    server: Running, http: httpx2.AsyncClient
):
    body = {**ASK, "user": "ann"}
    reply = (await http.post("/v1/chat/completions", json=body)).json()
    thumb = {"response_id": reply["id"], "thumb": "up", "user": "ann", "comment": "lovely"}
    first = await http.post("/v1/feedback", json=thumb)
    assert first.status_code == 200
    assert first.json() == {
        "object": "feedback",
        "id": 1,
        "policy_version": 0,
        "duplicate": False,
    }
    assert (await http.post("/v1/feedback", json=thumb)).json()["duplicate"]
    assert counts(server) == (1, 1)
    down = {**thumb, "thumb": "down", "request_id": "r"}
    for is_duplicate in (False, True):
        stored = (await http.post("/v1/feedback", json=down)).json()
        assert (stored["id"], stored["duplicate"]) == (2, is_duplicate)
    taken = await http.post("/v1/feedback", json={**down, "thumb": "up"})
    assert taken.status_code == 409
    assert server.database is not None
    with reading(server.database) as connection:
        (rated,) = feedback.list_rated(connection, DEFAULT_POLICY)
    assert (rated.response_id, rated.value, rated.user) == (reply["id"], 0, User("", "ann"))


async def test_a_thumb_for_a_reply_of_somebody_else_is_not_found(
    server: Running, http: httpx2.AsyncClient
):
    reply = await server.generate("hello", user_id="ann")
    said = set()
    for response_id, user in (("never-given", "ann"), (reply.response_id, "bob")):
        body = {"response_id": response_id, "thumb": "up", "user": user}
        refusal = await http.post("/v1/feedback", json=body)
        assert refusal.status_code == 404
        said.add(refusal.text)
    assert len(said) == 1
    assert counts(server) == (0, 0)


async def test_a_streamed_reply_can_be_rated_over_the_other_wire(
    server: Running, http: httpx2.AsyncClient
):
    body = {**ASK, "user": "ann", "stream": True}
    events = events_of((await http.post("/v1/chat/completions", json=body)).text)
    stored = await server.client.rate(events[0]["id"], up=True, user_id="ann")
    assert stored.feedback_id == 1


# The port


async def test_requests_are_counted_by_route_and_status(server: Running, http: httpx2.AsyncClient):
    await http.get("/v1/models")
    for body in (COMPLETE, COMPLETE, {**COMPLETE, "stream": True}, {}):
        await http.post("/v1/completions", json=body)
    await http.post("/v1/feedback", json={"response_id": "r", "thumb": "up"})
    assert await requests_of(server) == {
        ("GET /v1/models", "200"): 1,
        ("POST /v1/completions", "200"): 3,
        ("POST /v1/completions", "400"): 1,
        ("POST /v1/feedback", "404"): 1,
    }


async def test_a_request_is_timed_until_all_of_its_answer_is_sent(
    server: Running, http: httpx2.AsyncClient
):
    registry, name = server.application._metrics.registry, "thumbloop_http_request_seconds"
    route = {"route": "POST /v1/completions"}
    for body in (COMPLETE, {**COMPLETE, "stream": True}):
        await http.post("/v1/completions", json=body)
    await http.get("/v1/nowhere")
    await until(lambda: registry.get_sample_value(f"{name}_count", route) == 2)
    assert 0 < registry.get_sample_value(f"{name}_sum", route) < 60
    assert registry.get_sample_value(f"{name}_count", {"route": "HTTP"}) is None


async def test_feedback_that_nobody_could_read_is_counted_as_refused(
    server: Running, http: httpx2.AsyncClient
):
    registry = server.application._metrics.registry
    await http.post("/v1/feedback", json={"response_id": "r", "thumb": "UP"})
    await http.post("/v1/feedback", content=b"{}", headers={"content-type": "text/plain"})
    await http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    refused = {"kind": "thumb", "reason": "invalid_request"}
    assert registry.get_sample_value("thumbloop_feedback_rejected_total", refused) == 2


async def start_and_stop(config: Any) -> Application:
    application = Application(config, lambda model, _config: FakeEngine(model))
    try:
        await application.start()
    finally:
        await application.stop()
    return application


async def test_a_port_in_use_is_a_settings_error(tiny_model: Path, state: State):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = config_of(tiny_model, state, http={"port": port})
        with pytest.raises(SettingsError, match=rf"http\.port: 127\.0\.0\.1:{port} .*another"):
            await start_and_stop(config)


async def test_a_port_that_is_not_wanted_is_not_opened(tiny_model: Path, state: State):
    async with running(tiny_model, state, http={"enabled": False}) as server:
        assert server.application.http_port == 0
        assert (await server.generate("hello")).text


@pytest.mark.parametrize("is_stream", [False, True])
async def test_stopping_lets_requests_finish_and_turns_late_ones_away(
    tiny_model: Path, state: State, is_stream: bool
):
    async with running(tiny_model, state) as server, web(server) as client:
        server.engine.may_sample.clear()
        body = {**COMPLETE, "stream": is_stream}
        call = asyncio.create_task(client.post("/v1/completions", json=body))
        await server.sampling(4)
        stopping = asyncio.create_task(server.application.stop())
        await asyncio.sleep(0.5)  # uvicorn looks ten times a second whether it has to end
        late = await client.post("/v1/completions", json=COMPLETE)
        assert late.status_code == 503
        assert "shutting down" in late.json()["error"]["message"]
        assert not call.done()
        assert not stopping.done()
        server.engine.may_sample.set()
        answer = await call
        assert answer.status_code == 200
        if is_stream:
            assert events_of(answer.text)
        await stopping
        with pytest.raises(httpx2.ConnectError):
            await client.get("/v1/models")
