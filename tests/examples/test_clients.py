"""The examples that call a server and end: each run as it is, and what it left in the store."""

import os
import re
from hashlib import sha256
from pathlib import Path

import pytest

from tests.examples.runs import Run, rated, replies, runner
from tests.serving import Running, running
from thumbloop.config import State
from thumbloop.store import reading
from thumbloop.store.schema import preferences
from thumbloop.types import Strategy


async def test_our_client_asks_rates_compares_and_streams(server: Running, run: Run):
    output = await run("chat.py")
    first, compared, streamed = replies(server)
    assert {reply.user.user_id for reply in (first, compared, streamed)} == {"ann"}
    assert output.startswith(f"version 0: {first.chosen.text}\n")
    assert output.endswith(f"{streamed.chosen.text}\n")
    assert rated(server) == {first.response_id: True}
    assert server.database is not None
    with reading(server.database) as connection:
        (preference,) = connection.execute(preferences.select())
    assert preference.response_id == compared.response_id


async def test_openais_client_asks_with_guidance_and_rates(server: Running, run: Run):
    output = await run("openai_client.py")
    (asked,) = replies(server)
    assert asked.chosen.text in output
    assert (asked.strategy, len(asked.candidates)) == (Strategy.BEST_OF_N, 8)
    assert rated(server) == {asked.response_id: True}


@pytest.fixture(scope="session")
def path_with_grpcurl(grpcurl: Path) -> str:
    return f"{grpcurl.parent}:{os.environ['PATH']}"


async def test_grpcurl_asks_rates_and_lists_versions(
    server: Running, run: Run, path_with_grpcurl: str
):
    output = await run("grpcurl.sh", PATH=path_with_grpcurl)
    (asked,) = replies(server)
    assert asked.prompt.text == "The soup was"
    assert rated(server) == {asked.response_id: True}
    assert re.search(r'"feedback_?id": "1"', output, re.IGNORECASE)
    assert re.search(r'"policy_?versions"', output, re.IGNORECASE)


@pytest.mark.parametrize("name", ["chat.py", "openai_client.py", "grpcurl.sh"])
async def test_an_example_shows_its_token(
    tiny_model: Path, tmp_path: Path, path_with_grpcurl: str, name: str
):
    scopes = ["generate", "feedback", "on_behalf", "admin"]
    known = {"sha256": sha256(b"secret").hexdigest(), "scopes": scopes}
    state = State(folder=tmp_path / "state")
    async with running(tiny_model, state, access={"tokens": {"backend": known}}) as server:
        run = runner(server)
        await run(name, THUMBLOOP_TOKEN="secret", PATH=path_with_grpcurl)
        assert {reply.user.subject for reply in replies(server)} == {"backend"}
        with pytest.raises(AssertionError, match="token"):
            await run(name, THUMBLOOP_TOKEN="another", PATH=path_with_grpcurl)
