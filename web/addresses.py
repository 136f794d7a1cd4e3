"""Where the server is, for a page that was not told: a demo that runs here, or the default address."""

import re
import socket
from pathlib import Path
from typing import NamedTuple

from thumbloop.client import DEFAULT_ADDRESS
from thumbloop.errors import SettingsError

_PORTS = re.compile(r"serving on port (\d+), metrics on (\d+)")
_TIMEOUT_S = 1.0


class Addresses(NamedTuple):
    """host:port of a server, and of its metrics."""

    server: str
    metrics: str


USUAL = Addresses(DEFAULT_ADDRESS, "127.0.0.1:9464")
"""Where the settings' defaults have them."""


def at(server: str) -> Addresses:
    """Return the addresses of a server that was named: its metrics are on the same host."""
    return Addresses(server, f"{server.rpartition(':')[0]}:{USUAL.metrics.rpartition(':')[2]}")


def of_demo(log: Path) -> Addresses | None:
    """Return what the server of a demo said of itself in its log; None where it said nothing."""
    said = _PORTS.search(log.read_text(errors="replace")) if log.is_file() else None
    return Addresses(*(f"127.0.0.1:{port}" for port in said.groups())) if said else None


def found(demo: Path) -> Addresses:
    """Return where something listens: the demo's server, or one at the default address. Raises SettingsError."""
    places = [place for place in (of_demo(demo / "server.log"), USUAL) if place]
    for place in places:
        if _listens(place.server):
            return place
    tried = " or ".join(place.server for place in places)
    raise SettingsError(
        f"no server listens on {tried}: start one (make demo, make serve), or say where it is (--address)"
    )


def _listens(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=_TIMEOUT_S).close()
    except OSError:
        return False
    return True
