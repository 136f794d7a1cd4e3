"""What the OpenAI-compatible port refuses, and in which words."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.failures import UNEXPECTED
from tests.fakes import FakeEngine
from tests.over_http import ASK, COMPLETE, Body, counts, head_of, rows, web
from tests.serving import Running, running, until
from thumbloop.config import State

WRONG: list[tuple[str, Body, str]] = [
    ("chat/completions", {"logit_bias": {"50": 1}}, "logit_bias"),
    ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
    ("chat/completions", {"frequency_penalty": 0.5}, "frequency_penalty"),
    ("chat/completions", {"logprobs": True}, "logprobs"),
    ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
    ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
    ("chat/completions", {"metadata": {"a": "b"}}, "metadata"),
    ("chat/completions", {"store": True}, "store"),
    ("chat/completions", {"guidance": {"magic": 1}}, "guidance.magic"),
    ("chat/completions", {"n": 2}, "n"),
    ("chat/completions", {"messages": None}, "messages"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ("chat/completions", {"messages": [{"role": "user", "content": " "}]}, "messages[0].content"),
    ("chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("chat/completions", {"messages": [{"role": None, "content": "x"}]}, "messages.0.role"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role"),
    ("chat/completions", {"learning": "perhaps"}, "learning"),
    ("chat/completions", {"user": "u" * 257}, "user"),
    ("chat/completions", {"request_id": "r" * 129}, "request_id"),
    ("completions", {"prompt": ""}, "prompt"),
    ("completions", {"prompt": None}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [[3, 4]]}, "prompt"),
    ("completions", {"prompt": ["several", "texts"]}, "prompt"),
    ("completions", {"logprobs": 0}, "logprobs"),
    ("completions", {"best_of": 2}, "best_of"),
    ("completions", {"echo": True}, "echo"),
    ("completions", {"suffix": "."}, "suffix"),
    ("completions", {"prompt": "x" * 200_001}, "prompt"),
    ("completions", {"prompt": "x y " * 400}, "prompt"),
    ("completions", {"messages": []}, "messages"),
    ("completions", {"max_completion_tokens": 3}, "max_completion_tokens"),
    ("completions", {"temperature": 2.5}, "temperature"),
    ("completions", {"temperature": "warm"}, "temperature"),
    ("completions", {"top_p": 0}, "top_p"),
    ("completions", {"max_tokens": 0}, "max_tokens"),
    ("completions", {"max_tokens": -1}, "max_tokens"),
    ("completions", {"seed": 2**64}, "seed"),
    ("completions", {"seed": -(2**63) - 1}, "seed"),
    ("completions", {"stop": ["a"] * 9}, "stop"),
    ("completions", {"stop": [""]}, "stop[0]"),
    ("completions", {"policy_version": -1}, "policy_version"),
    ("completions", {"guidance": {"num_candidates": 17}}, "guidance.num_candidates"),
    (
        "completions",
        {"model": "default:none", "guidance": {"strategy": "none"}},
        "guidance.strategy",
    ),
    ("completions", {"guidance": {"strategy": "worst"}}, "guidance.strategy"),
    ("completions", {"model": "default:worst"}, "guidance.strategy"),
    ("feedback", {"thumb": "sideways"}, "thumb"),
    ("feedback", {"response_id": ""}, "response_id"),
    ("feedback", {"stars": 5}, "stars"),
    ("feedback", {"echo": False}, "echo"),
    ("feedback", {"comment": "c" * 4097}, "comment"),
    ("feedback", {"user": "u" * 257}, "user"),
]
"""A path, what is wrong in a body for it, and what the refusal calls the field."""


async def test_what_is_wrong_is_named_as_the_caller_wrote_it(
    server: Running, http: httpx2.AsyncClient
):
    bodies = {
        "completions": COMPLETE,
        "chat/completions": ASK,
        "feedback": {"response_id": "r", "thumb": "up"},
    }
    for path, wrong, param in WRONG:
        refusal = await http.post(f"/v1/{path}", json={**bodies[path], **wrong})
        error = refusal.json()["error"]
        assert (refusal.status_code, error["param"]) == (400, param), wrong
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_argument")
        assert error["message"]
    assert (server.engine.started, rows(server), counts(server)) == (0, [], (0, 0))


async def test_a_turn_of_anything_but_text_is_refused(http: httpx2.AsyncClient):
    for content in ([{"type": "image_url", "image_url": {"url": "x"}}], 7):
        body = {"messages": [{"role": "user", "content": content}]}
        refusal = await http.post("/v1/chat/completions", json=body)
        assert refusal.status_code == 400
        assert refusal.json()["error"]["param"].startswith("messages.0.content")


NO_OBJECTS = [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"prompt=x"]


async def test_a_body_that_is_no_object_of_json_is_refused(
    server: Running, http: httpx2.AsyncClient
):
    for content in NO_OBJECTS:
        refusal = await http.post("/v1/completions", content=content)
        assert refusal.status_code == 400, content
        assert refusal.json()["error"]["message"]
    assert server.engine.started == 0


async def test_a_page_of_another_site_cannot_post_as_its_visitor(
    server: Running, http: httpx2.AsyncClient
):
    """A browser asks us first before a page of another site may send JSON, and other bodies it sends.
    A page whose name means loopback is the same site to it: test_http_port.py has that."""
    body = json.dumps(COMPLETE).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = await http.post("/v1/completions", content=body, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "content-type"), kind
    assert server.engine.started == 0
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        answer = await http.post("/v1/completions", content=body, headers={"content-type": kind})
        assert answer.status_code == 200, kind


async def test_an_unknown_model_is_not_found_and_the_known_one_is_named(
    http: httpx2.AsyncClient,
):
    refusal = await http.post("/v1/chat/completions", json={**ASK, "model": "gpt-4o"})
    assert refusal.status_code == 404
    assert "served: default" in refusal.json()["error"]["message"]


async def test_a_body_beyond_the_limit_is_refused_and_not_read_to_its_end(
    tiny_model: Path, state: State
):
    async with (
        running(tiny_model, state, listen={"max_message_bytes": 20_000}) as server,
        web(server) as client,
    ):
        fits = json.dumps(COMPLETE).encode().ljust(20_000)
        assert (await client.post("/v1/completions", content=fits)).status_code == 200
        refusal = await client.post("/v1/completions", content=fits + b" ")
        assert refusal.status_code == 400
        assert refusal.json()["error"]["param"] == "body"
        assert "more than 20000 bytes" in refusal.json()["error"]["message"]
        port = server.application.http_port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head_of(10**9) + fits + b" ")
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), 10)
        assert answer.startswith(b"HTTP/1.1 400")
        writer.close()
        await writer.wait_closed()


async def test_other_paths_and_methods_are_none_of_ours(http: httpx2.AsyncClient):
    assert (await http.get("/v1/embeddings")).status_code == 404
    assert (await http.get("/v1/completions")).status_code == 405
    assert (await http.post("/v1/models")).status_code == 405


async def test_an_unexpected_error_tells_nothing(
    http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("the secret path /etc/passwd")

    monkeypatch.setattr(FakeEngine, "speak", fail)
    for is_stream in (False, True):
        refusal = await http.post("/v1/completions", json={**COMPLETE, "stream": is_stream})
        assert refusal.status_code == 500
        assert refusal.json()["error"]["message"] == UNEXPECTED
        assert "the secret path" not in refusal.text
        assert "the secret path" in caplog.text


async def test_a_reply_that_takes_too_long_is_a_timeout(tiny_model: Path, state: State):
    async with (
        running(tiny_model, state, limits={"default_timeout_s": 0.2}) as server,
        web(server) as client,
    ):
        server.engine.may_sample.clear()
        for is_stream in (False, True):
            body = {**COMPLETE, "stream": is_stream}
            refusal = await client.post("/v1/completions", json=body)
            assert refusal.status_code == 504
            assert refusal.json()["error"]["code"] == "deadline_exceeded"
        await until(lambda: server.engine.aborted == 8)


async def test_a_refusal_is_short_whatever_the_body_repeats(http: httpx2.AsyncClient):
    strange = {f"{'x' * 1000}{i}": i for i in range(1000)}
    for extra in (strange, {"messages": [{"role": "nobody"}] * 1000}):
        refusal = await http.post("/v1/chat/completions", json={**ASK, **extra})
        assert refusal.status_code == 400
        assert " more" in refusal.json()["error"]["message"]
        assert len(refusal.content) < 2000
