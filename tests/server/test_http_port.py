"""The HTTP port: by what names it answers."""

import hashlib
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
