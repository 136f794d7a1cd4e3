"""Servers that ask who calls, and certificates."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from tests.access import tokens
from tests.papers import Papers, write
from tests.serving import Running, running
from thumbloop.config import State
from thumbloop.types import Scope


@pytest.fixture
async def guarded(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A server with a token for each scope alone, named after it."""
    access = tokens(**{scope.value: [scope.value] for scope in Scope})
    async with running(tiny_model, state, access=access) as server:
        yield server


@pytest.fixture
async def shared(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A server of two backends that speak for users, and of one caller that speaks for itself."""
    many, one = ["generate", "feedback", "on_behalf"], ["generate", "feedback"]
    access = tokens(backend=many, rival=many, single=one)
    async with running(tiny_model, state, access=access) as server:
        yield server


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    folder = tmp_path_factory.mktemp("papers")
    server_ca, client_ca = trustme.CA(), trustme.CA()
    certificate, key, authorities = (folder / name for name in ("c.pem", "k.pem", "a.pem"))
    write(server_ca.issue_cert("127.0.0.1", "localhost"), certificate, key)
    client_ca.cert_pem.write_to_path(authorities)
    return Papers(server_ca, client_ca, certificate, key, authorities)
