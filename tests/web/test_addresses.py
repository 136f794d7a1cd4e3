"""Where the page finds a server."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from thumbloop.errors import SettingsError
from web import addresses
from web.addresses import USUAL, Addresses


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def free() -> Iterator[int]:
    """A port that nothing listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def write_log(folder: Path, port: int) -> Addresses:
    (folder / "server.log").write_text(f"…\nserving on port {port}, metrics on 42, HTTP on 43\n")
    return Addresses(f"127.0.0.1:{port}", "127.0.0.1:42")


@pytest.mark.parametrize(
    ("server", "metrics"),
    [
        ("10.1.2.3:50052", "10.1.2.3:9464"),
        ("[::1]:5", "[::1]:9464"),
        ("far.example:1", "far.example:9464"),
    ],
)
def test_the_metrics_of_a_server_that_was_named_are_on_its_host(server: str, metrics: str):
    assert addresses.at(server) == Addresses(server, metrics)


def test_a_demo_that_runs_comes_first(tmp_path: Path, taken: int):
    written = write_log(tmp_path, taken)
    assert addresses.found(tmp_path) == written


def test_after_a_demo_the_default_address_is_tried(
    tmp_path: Path, taken: int, free: int, monkeypatch: pytest.MonkeyPatch
):
    write_log(tmp_path, free)
    usual = USUAL._replace(server=f"127.0.0.1:{taken}")
    monkeypatch.setattr(addresses, "USUAL", usual)
    assert addresses.found(tmp_path) == usual


def test_where_nothing_listens_it_says_what_to_do(
    tmp_path: Path, free: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(addresses, "USUAL", USUAL._replace(server=f"127.0.0.1:{free}"))
    with pytest.raises(SettingsError, match=f"no server listens on 127.0.0.1:{free}: start one"):
        addresses.found(tmp_path)


def test_a_log_that_says_nothing_yet_is_no_demo(tmp_path: Path):
    (tmp_path / "server.log").write_text("starting\n")
    assert addresses.of_demo(tmp_path / "server.log") is None
