"""python -m web: the page for raters, beside a server that runs."""

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from thumbloop.client import AsyncClient, Tls
from thumbloop.connecting import (
    Authorities,
    Certificate,
    Key,
    Token,
    WithTls,
    saying_in_one_line,
    tls_of,
)
from thumbloop.errors import SettingsError
from thumbloop.hosts import is_loopback
from web.addresses import at, found
from web.page import THIS_MACHINE, application

_STOP_S = 2


async def show(
    server: str,
    metrics: str,
    token: str,
    tls: Tls | None,
    hosts: Sequence[str],
    listening: socket.socket,
) -> None:
    """Show the page until a signal ends it."""
    async with AsyncClient(server, token=token, tls=tls) as client:
        page = application(client, metrics, hosts)
        # Pages that are open are cut off at the end: an error to uvicorn, none to us.
        config = uvicorn.Config(page, log_level="critical", timeout_graceful_shutdown=_STOP_S)
        where = "{}:{}".format(*listening.getsockname())
        print(f"http://{where} is the page, {server} answers; Ctrl-C ends it", flush=True)
        await uvicorn.Server(config).serve(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Open the port. Raises SettingsError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SettingsError(
            f"--port: {host}:{port} cannot be bound: {error.strerror}; choose another"
        ) from None


def refuse_strangers(host: str, *, insecure: bool) -> None:
    """Raise SettingsError where others than this machine's users could open the page, which asks nobody who they are."""
    if not (insecure or is_loopback(host)):
        raise SettingsError(
            f"--host: {host} can be reached by strangers, and the page asks nobody for a password; bind"
            " 127.0.0.1, or say --insecure where something in front of the page does"
        )


def main(
    address: Annotated[
        str | None,
        typer.Option(
            envvar="THUMBLOOP_ADDRESS",
            help="host:port of the server; absent: of a demo that runs, or the default.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(envvar="THUMBLOOP_METRICS", help="host:port of the server's metrics."),
    ] = None,
    demo: Annotated[Path, typer.Option(help="A run of the demo, whose ports count.")] = Path(
        "runs/demo"
    ),
    host: Annotated[str, typer.Option(help="Where the page is, an IP address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it is looked at.")] = 7860,
    *,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Show the page to strangers.")
    ] = False,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """Chat, and rate, in a browser."""
    with saying_in_one_line():
        refuse_strangers(host, insecure=insecure)
        place = found(demo) if address is None else at(address)
        how = tls_of(ca, cert, key, tls)
        with listen(host, port) as listening:
            hosts = ("*",) if insecure else (*THIS_MACHINE, host)
            asyncio.run(show(place.server, metrics or place.metrics, token, how, hosts, listening))


if __name__ == "__main__":
    typer.run(main)
