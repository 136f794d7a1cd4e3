"""TLS on both ports, and files that are of no use for it."""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
import trustme
from grpc_health.v1 import health_pb2

from server.application import Application
from tests.access import GENERATE, secret_of, tokens
from tests.fakes import FakeEngine
from tests.papers import Papers
from tests.refusals import refused
from tests.serving import Running, config_of, health, running
from thumbloop.client import AsyncClient, Tls
from thumbloop.config import State
from thumbloop.errors import SettingsError, Unauthenticated, Unavailable


async def grpc_answers(server: Running, tls: Tls | None) -> bool:
    """Say whether a gRPC call gets through to the server."""
    address = f"127.0.0.1:{server.port}"
    channel = (
        grpc.aio.insecure_channel(address)
        if tls is None
        else grpc.aio.secure_channel(address, tls.credentials())
    )
    async with channel:
        error = await refused(channel.unary_unary(GENERATE)(b"", timeout=10))
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE)
    return error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def http_answers(server: Running, context: ssl.SSLContext | None) -> bool:
    """Say whether an HTTP request gets through to the server."""
    scheme = "http" if context is None else "https"
    url = f"{scheme}://127.0.0.1:{server.application.http_port}/v1/models"
    async with httpx2.AsyncClient(verify=context or False, timeout=10) as client:
        try:
            return (await client.get(url)).status_code == 200
        except httpx2.TransportError:
            return False


async def test_with_tls_both_ports_speak_nothing_else(
    tiny_model: Path, state: State, papers: Papers
):
    async with running(tiny_model, state, listen=papers.listen) as server:
        assert await grpc_answers(server, papers.tls())
        assert await http_answers(server, papers.context())
        assert not await grpc_answers(server, None)
        assert not await http_answers(server, None)
        stranger = trustme.CA()
        assert not await grpc_answers(server, Tls(stranger.cert_pem.bytes()))
        untrusting = ssl.create_default_context(cadata=stranger.cert_pem.bytes().decode())
        assert not await http_answers(server, untrusting)


async def test_with_client_authorities_only_who_shows_a_certificate_of_theirs_gets_in(
    tiny_model: Path, state: State, papers: Papers
):
    known = papers.client_ca.issue_cert("ann@example.org")
    foreign = trustme.CA().issue_cert("ann@example.org")
    async with running(tiny_model, state, listen=papers.mutual) as server:
        assert await grpc_answers(server, papers.tls(known))
        assert await http_answers(server, papers.context(known))
        for shown in (None, foreign):
            assert not await grpc_answers(server, papers.tls(shown))
            assert not await http_answers(server, papers.context(shown))


async def test_probes_need_neither_tls_nor_a_token_and_get_nothing_else(
    tiny_model: Path, state: State, papers: Papers
):
    listen = {**papers.mutual, "health_port": 0}
    access = tokens(backend=["generate"])
    async with running(tiny_model, state, listen=listen, access=access) as server:
        port = server.application.health_port
        assert await health(port) == health_pb2.HealthCheckResponse.SERVING
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            error = await refused(channel.unary_unary(GENERATE)(b"", timeout=10))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_client_with_token_and_tls_holds_a_conversation(
    tiny_model: Path, state: State, papers: Papers
):
    access = tokens(backend=["generate", "feedback", "on_behalf"])
    async with running(tiny_model, state, listen=papers.listen, access=access) as server:
        address = f"localhost:{server.port}"
        token = secret_of("backend")
        async with AsyncClient(address, token=token, tls=papers.tls()) as client:
            reply = await client.generate("hello", user_id="ann")
            assert (await client.rate(reply.response_id, up=True, user_id="ann")).feedback_id == 1
        async with AsyncClient(address, tls=papers.tls()) as client:
            with pytest.raises(Unauthenticated):
                await client.generate("hello")
        async with AsyncClient(address, token=token) as client:
            with pytest.raises(Unavailable):
                await client.generate("hello")


def _missing(path: Path) -> None:
    path.unlink()


def _garbage(path: Path) -> None:
    path.write_text("this is no certificate")


def _foreign_key(path: Path) -> None:
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(path)


@pytest.mark.parametrize(
    ("setting", "spoil", "why"),
    [
        ("tls_certificate", _missing, "cannot be read"),
        ("tls_key", _missing, "cannot be read"),
        ("tls_client_ca", _missing, "cannot be read"),
        ("tls_certificate", _garbage, "PEM"),
        ("tls_key", _garbage, "PEM"),
        ("tls_client_ca", _garbage, "PEM"),
        ("tls_key", _foreign_key, "PEM"),
    ],
)
async def test_a_pem_file_that_is_of_no_use_is_named_by_its_setting(
    tiny_model: Path,
    state: State,
    papers: Papers,
    tmp_path: Path,
    setting: str,
    spoil: Callable[[Path], None],
    why: str,
):
    listen: dict[str, Any] = {"port": 0}
    for name, path in papers.mutual.items():
        listen[name] = tmp_path / path.name
        listen[name].write_bytes(path.read_bytes())
    spoil(listen[setting])
    application = Application(
        config_of(tiny_model, state, listen=listen), lambda model, _config: FakeEngine(model)
    )
    try:
        with pytest.raises(SettingsError, match=rf"listen\.{setting}: {listen[setting]}.*{why}"):
            await application.start()
    finally:
        await application.stop()
