"""The HTTP port: by what names it answers, how many, how long it waits for a request, how it opens and
closes, and how its requests are counted and timed."""

import asyncio
import hashlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.access import is_open_to_pages
from server.application import Application
from tests.fakes import FakeEngine
from tests.over_http import COMPLETE, events_of, requests_of, web
from tests.serving import Running, config_of, running, until
from thumbloop.config import State
from thumbloop.errors import SettingsError

OURS = [
    "127.0.0.1",
    "127.0.0.1:8080",
    "127.0.0.2:1",
    "localhost",
    "LocalHost:8080",
    "[::1]",
    "[::1]:9",
]
OTHERS = [
    "rebound.example",
    "rebound.example:8080",
    "localhost.rebound.example",
    "127.0.0.1.rebound.example:8080",
    "localhost:8080@rebound.example",
    "[::1].rebound.example",
    "192.168.0.7:8080",
    "[fd00::7]:8080",
    "0.0.0.0:8080",
    "",
]
TOKEN = "the-token-of-a-backend"
SCOPES = ["generate", "feedback"]
ACCESS = {
    "tokens": {"backend": {"sha256": hashlib.sha256(TOKEN.encode()).hexdigest(), "scopes": SCOPES}}
}
TLS = {"tls_certificate": Path("certificate.pem"), "tls_key": Path("key.pem")}


async def test_a_page_whose_name_was_made_to_mean_loopback_is_refused(server: Running):
    """DNS rebinding: to its visitor's browser such a page and this server are the same site."""
    async with web(server) as client:
        for host in OURS:
            answer = await client.get("/v1/models", headers={"host": host})
            assert answer.status_code == 200, host
        for host in OTHERS:
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/")):
                refusal = await client.request(method, path, headers={"host": host}, json={})
                assert refusal.status_code == 403, host
                error = refusal.json()["error"]
                assert (error["type"], error["code"]) == ("permission_error", "permission_denied")
                assert error["message"].startswith("host: ")
    assert server.engine.started == 0


@pytest.mark.parametrize(
    "sections", [{"access": ACCESS}, {"listen": {"insecure": True}}], ids=["tokens", "insecure"]
)
async def test_a_server_that_knows_its_callers_answers_to_any_name(
    tiny_model: Path, state: State, sections: dict[str, Any]
):
    headers = {"host": "thumbloop.example", "authorization": f"Bearer {TOKEN}"}
    async with running(tiny_model, state, **sections) as server, web(server) as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


def test_a_certificate_is_for_its_own_names_alone(tiny_model: Path, state: State):
    assert is_open_to_pages(config_of(tiny_model, state))
    assert not is_open_to_pages(config_of(tiny_model, state, listen=TLS))


# Connections

BODY = b'{"prompt": "The soup was"}'
HEAD = b"\r\n".join(
    (
        b"POST /v1/completions HTTP/1.1",
        b"host: localhost",
        b"content-type: application/json",
        b"content-length: %d" % len(BODY),
        b"\r\n",
    )
)
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"

Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def wired(server: Running) -> AsyncIterator[Wire]:
    """Open a connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.application.http_port)
    yield reader, writer
    writer.close()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """Return the next answer's status, headers and body."""
    async with asyncio.timeout(10):
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers["content-length"]))
    return int(first.split()[1]), headers, json.loads(body)


async def drip(writer: asyncio.StreamWriter, letters: bytes) -> None:
    """Send a letter now and then, until the other side has closed."""
    for letter in letters:
        writer.write(bytes((letter,)))
        await asyncio.sleep(0.05)


async def closed_after(reader: asyncio.StreamReader) -> float:
    """Return the seconds until the other side closes; it says nothing before."""
    start = asyncio.get_running_loop().time()
    async with asyncio.timeout(10):
        with suppress(ConnectionResetError):  # where it had not read all that was sent
            assert await reader.read() == b""
    return asyncio.get_running_loop().time() - start


async def test_a_body_that_does_not_come_is_answered_in_time(tiny_model: Path, state: State):
    settings = {"body_timeout_s": 0.3, "head_timeout_s": 1}
    async with (
        running(tiny_model, state, http=settings) as server,
        wired(server) as (
            reader,
            writer,
        ),
    ):
        writer.write(HEAD + BODY[:-1])
        status, _, answer = await answer_of(reader)
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        assert "within 0.3 s" in answer["error"]["message"]
        assert 0.3 < await closed_after(reader) < 5
        assert server.engine.started == 0


async def test_a_body_may_come_in_pieces(tiny_model: Path, state: State):
    async with running(tiny_model, state) as server, wired(server) as (reader, writer):
        writer.write(HEAD)
        await drip(writer, BODY)
        status, _, answer = await answer_of(reader)
        assert (status, answer["object"]) == (200, "text_completion")


@pytest.mark.parametrize("first", [b"", MODELS], ids=["at first", "after a reply"])
@pytest.mark.parametrize("letters", [b"", b"G" + MODELS[1:-2] + b"x: " + b"x" * 200])
async def test_a_head_that_does_not_come_to_its_end_closes_the_connection(
    tiny_model: Path, state: State, first: bytes, letters: bytes
):
    async with (
        running(tiny_model, state, http={"head_timeout_s": 1}) as server,
        wired(server) as (reader, writer),
    ):
        if first:
            writer.write(first)
            assert (await answer_of(reader))[0] == 200
        dripping = asyncio.create_task(drip(writer, letters))
        assert 0.3 < await closed_after(reader) < 5
        dripping.cancel()
        await asyncio.wait((dripping,))


async def test_a_reply_may_take_longer_than_a_head(tiny_model: Path, state: State):
    async with running(tiny_model, state, http={"head_timeout_s": 1}) as server:
        server.engine.may_sample.clear()
        async with wired(server) as (reader, writer):
            writer.write(HEAD + BODY)
            await asyncio.sleep(1.5)
            server.engine.may_sample.set()
            assert (await answer_of(reader))[0] == 200
            writer.write(MODELS)
            assert (await answer_of(reader))[0] == 200
            writer.write(MODELS[:-1])
            assert 0.3 < await closed_after(reader) < 5


async def test_one_connection_too_many_is_turned_away_and_the_others_are_not(
    tiny_model: Path, state: State
):
    async with (
        running(tiny_model, state, http={"max_connections": 2}) as server,
        wired(server) as (first, asking),
    ):
        async with wired(server) as (second, also_asking):
            for reader, writer in ((first, asking), (second, also_asking)):
                writer.write(MODELS)
                assert (await answer_of(reader))[0] == 200
            async with wired(server) as (third, one_too_many):
                one_too_many.write(MODELS)
                status, headers, answer = await answer_of(third)
                assert (status, headers["connection"]) == (503, "close")
                assert answer["error"]["code"] == "unavailable"
                assert await third.read() == b""
                for reader, writer in ((first, asking), (second, also_asking)):
                    writer.write(MODELS)
                    assert (await answer_of(reader))[0] == 200
        await asyncio.sleep(0.1)
        async with wired(server) as (reader, writer):
            writer.write(MODELS)
            assert (await answer_of(reader))[0] == 200


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
