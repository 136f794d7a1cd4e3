"""Fixtures of several packages: a tiny model on disk, and an engine that needs none."""

import asyncio
import socketserver
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn.server

from tests.postgresql import Cluster, cluster
from tests.stores import empty_state
from thumbloop.config import State

# The metrics' server looks so often whether it has to stop, and every test that starts ours waits for it: by
# default it is twice a second.
socketserver.BaseServer.serve_forever.__defaults__ = (0.02,)


class _Hurried:
    """asyncio, in which one waits a tenth as long."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(delay: float) -> None:
        await asyncio.sleep(delay / 10)


# uvicorn looks ten times a second whether it has to stop, then waits as long for connections to close, and every
# test that starts a server of ours waits for both.
uvicorn.server.asyncio = _Hurried()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_model import build_tiny_model  # seconds of imports, not for every test

    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def state(tmp_path: Path) -> State:
    """Where a store is, and empty."""
    return empty_state(tmp_path / "state")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    """A PostgreSQL that runs."""
    with cluster() as running:
        yield running


@pytest.fixture(scope="session")
def grpcurl() -> Path:
    """Return where grpcurl is; it is fetched where it is not installed."""
    script = Path(__file__).parents[1] / "scripts/grpcurl"
    return Path(subprocess.check_output([script], text=True).strip())
