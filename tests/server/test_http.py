"""The OpenAI-compatible port: answers, retries, thumbs."""

import asyncio
from pathlib import Path

import httpx2
import pytest

from tests.over_http import (
    ASK,
    COMPLETE,
    ONE,
    Body,
    both,
    counts,
    events_of,
    piece_of,
    rows,
    web,
)
from tests.serving import Running, running
from thumbloop.config import State
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
