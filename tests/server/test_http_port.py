"""The HTTP port: by what names it answers, how many, and how long it waits for a request."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.access import is_open_to_pages
from tests.serving import Running, config_of, running
from thumbloop.config import State

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


def web(server: Running) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.application.http_port}")


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
