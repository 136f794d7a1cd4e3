"""A server that strangers reach has to ask who they are."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.access import refuse_strangers
from server.application import Application
from tests.access import tokens
from tests.fakes import FakeEngine
from tests.serving import config_of, running
from thumbloop.client import AsyncClient
from thumbloop.config import ServerConfig, State
from thumbloop.errors import SettingsError

# Strangers

ROOT = Path(__file__).parents[3]

LOOPBACK = ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"]
PUBLIC = ["0.0.0.0", "::", "", "10.0.0.5", "192.168.1.7", "2001:db8::1", "localhost.example.org"]

TLS = {"tls_certificate": "c.pem", "tls_key": "k.pem"}
MUTUAL = {**TLS, "tls_client_ca": "a.pem"}
TOKENS = tokens(ann=["generate"])
SAFE: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({}, {}, False),
    ({}, TOKENS, False),
    (TLS, {}, False),
    (TLS, TOKENS, True),
    (MUTUAL, {}, True),
    (MUTUAL, TOKENS, True),
    ({"insecure": True}, {}, True),
    ({"insecure": True}, TOKENS, True),
    ({"insecure": True, **TLS}, {}, True),
]
"""Settings of listen, of access, and whether strangers may then reach the server."""


@pytest.mark.parametrize("section", ["listen", "http", "metrics"])
@pytest.mark.parametrize(("listen", "access", "is_safe"), SAFE)
@pytest.mark.parametrize("host", LOOPBACK + PUBLIC)
def test_strangers_may_reach_only_a_server_that_asks_who_they_are(
    host: str, listen: dict[str, Any], access: dict[str, Any], is_safe: bool, section: str
):
    values: dict[str, Any] = {"listen": listen, "access": access, "http": {}, "metrics": {}}
    values[section] = {**values[section], "host": host}
    config = ServerConfig(**values)
    if is_safe or host in LOOPBACK:
        refuse_strangers(config)
    else:
        with pytest.raises(SettingsError, match=rf"{section}\.host: .*--insecure"):
            refuse_strangers(config)


def test_a_port_that_is_not_served_is_reached_by_nobody():
    refuse_strangers(ServerConfig(http={"host": "0.0.0.0", "enabled": False}))


@pytest.mark.parametrize("section", ["listen", "http", "metrics"])
async def test_a_server_refuses_to_start_where_strangers_are(
    tiny_model: Path, state: State, section: str
):
    application = Application(
        config_of(tiny_model, state, **{section: {"host": "0.0.0.0", "port": 0}}),
        lambda model, _config: FakeEngine(model),
    )
    try:
        with pytest.raises(SettingsError, match=rf"{section}\.host"):
            await application.start()
        assert (application.port, application.http_port, application.metrics_port) == (0, 0, 0)
    finally:
        await application.stop()


async def test_a_server_that_was_told_not_to_ask_starts_where_strangers_are(
    tiny_model: Path, state: State
):
    public = {"host": "0.0.0.0", "port": 0}
    listen = {**public, "insecure": True}
    async with running(tiny_model, state, listen=listen, http=public, metrics=public) as server:
        assert (await server.generate("hello")).text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: listen.host: 0.0.0.0 can be reached by strangers"),
        (["--insecure"], "error: model.path: no model is set"),
    ],
)
def test_the_command_line_can_tell_it_not_to_ask(tmp_path: Path, arguments: list[str], said: str):
    file = tmp_path / "server.yaml"
    file.write_text("listen: {host: 0.0.0.0}\n")
    command = [sys.executable, "-m", "server", "--config", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(said)


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
async def test_a_server_listens_on_an_address_of_ipv6(tiny_model: Path, state: State):
    where = {"host": "[::1]", "port": 0}
    async with running(tiny_model, state, listen=where, http=where) as server:
        async with AsyncClient(f"[::1]:{server.port}") as client:
            assert (await client.generate("hello")).text
        url = f"http://[::1]:{server.application.http_port}/v1/models"
        async with httpx2.AsyncClient() as client:
            assert (await client.get(url)).status_code == 200
