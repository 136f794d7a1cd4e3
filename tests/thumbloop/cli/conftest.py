"""A server, and the command line of clients of it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.commands import run
from tests.serving import Running, running
from thumbloop.config import State


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDRESS", "TOKEN", "CA", "CERT", "KEY", "TLS"):
        monkeypatch.delenv(f"THUMBLOOP_{name}", raising=False)


@pytest.fixture
async def server(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    async with running(tiny_model, state) as server:
        yield server


@pytest.fixture
def thumbloop(server: Running) -> Callable[..., Awaitable[Result]]:
    """Runs the command against the server."""

    async def thumbloop(*arguments: str) -> Result:
        return await run(*arguments, "--address", f"127.0.0.1:{server.port}")

    return thumbloop
