"""How commands reach a server: their common options, and what goes wrong in one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from thumbloop.client import Client, Tls
from thumbloop.errors import SettingsError, ThumbloopError

Address = Annotated[str, typer.Option(envvar="THUMBLOOP_ADDRESS", help="Where the server listens.")]
Token = Annotated[str, typer.Option(envvar="THUMBLOOP_TOKEN", help="Bearer token.")]
Authorities = Annotated[
    Path | None,
    typer.Option(
        "--ca", envvar="THUMBLOOP_CA", help="PEM file of authorities to trust; turns TLS on."
    ),
]
Certificate = Annotated[
    Path | None,
    typer.Option(
        "--cert", envvar="THUMBLOOP_CERT", help="PEM file of a certificate to show; needs --key."
    ),
]
Key = Annotated[
    Path | None,
    typer.Option("--key", envvar="THUMBLOOP_KEY", help="PEM file of its private key."),
]
WithTls = Annotated[
    bool,
    typer.Option(
        "--tls",
        envvar="THUMBLOOP_TLS",
        help="TLS; without --ca the public authorities are trusted.",
    ),
]


@contextmanager
def saying_in_one_line() -> Iterator[None]:
    """Say what goes wrong in one line, and end with a status that tells."""
    try:
        yield
    except ThumbloopError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@contextmanager
def server(
    address: str, token: str, ca: Path | None, cert: Path | None, key: Path | None, tls: bool
) -> Iterator[Client]:
    """Connect; what goes wrong is said in one line."""
    with (
        saying_in_one_line(),
        Client(address, token=token, tls=tls_of(ca, cert, key, tls)) as client,
    ):
        yield client


def tls_of(ca: Path | None, cert: Path | None, key: Path | None, tls: bool) -> Tls | None:
    """Return how to reach a server with TLS, which each of these turns on. Raises SettingsError."""
    if (cert is None) != (key is None):
        raise SettingsError("--cert and --key need each other")
    if not (tls or ca or cert):
        return None
    return Tls(_pem("--ca", ca), _pem("--cert", cert), _pem("--key", key))


def _pem(option: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{option}: {path} cannot be read: {error.strerror}") from None
