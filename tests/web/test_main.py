"""The command: where it starts, where it does not, and how it ends."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import typer
from typer.testing import CliRunner

from thumbloop.errors import SettingsError
from web import addresses
from web.__main__ import listen, main, refuse_strangers

ROOT = Path(__file__).parents[2]
NOBODY = "127.0.0.1:9"  # the port of nothing


def test_it_starts_beside_a_server_that_is_not_there_yet_and_ends_on_a_signal():
    command = [sys.executable, "-m", "web", "--address", NOBODY, "--port", str(free_port())]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.endswith(f" is the page, {NOBODY} answers; Ctrl-C ends it\n")
            url = said.split()[0]
            with httpx2.Client(timeout=60) as client:
                assert "Thumbloop" in client.get(url).text
                stranger = client.get(url, headers={"host": "evil.example"})
            assert (stranger.status_code, stranger.text) == (400, "Invalid host header")
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "example.com"])
def test_strangers_are_refused(host: str):
    with pytest.raises(SettingsError, match=f"--host: {host} can be reached by strangers"):
        refuse_strangers(host, insecure=False)
    refuse_strangers(host, insecure=True)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"--port: 127.0.0.1:{port} cannot be bound"):
            listen("127.0.0.1", port)


def test_without_a_server_the_command_ends_in_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(addresses, "USUAL", addresses.USUAL._replace(server=NOBODY))
    monkeypatch.delenv("THUMBLOOP_ADDRESS", raising=False)
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["--demo", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: no server listens on {NOBODY}: start one")
