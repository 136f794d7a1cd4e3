"""How the examples are run, as processes, as their readers do it, and what they leave behind."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.serving import Running
from thumbloop.store import feedback, interactions, reading
from thumbloop.types import DEFAULT_POLICY, Interaction

ROOT = Path(__file__).parents[2]

Run = Callable[..., Awaitable[str]]


def environment(server: Running, **more: str) -> dict[str, str]:
    """Return the environment of a process that calls this server."""
    ours = {name: text for name, text in os.environ.items() if not name.startswith("THUMBLOOP_")}
    return ours | {
        "THUMBLOOP_ADDRESS": f"127.0.0.1:{server.port}",
        "OPENAI_BASE_URL": f"http://127.0.0.1:{server.application.http_port}/v1",
        **more,
    }


def runner(server: Running) -> Run:
    """Return what runs an example against a server; it returns what that prints."""

    async def run(name: str, **more: str) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable if name.endswith(".py") else "bash",
            str(ROOT / "examples" / name),
            env=environment(server, **more),
            stdout=PIPE,
            stderr=PIPE,
        )
        output, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        return output.decode()

    return run


def replies(server: Running) -> list[Interaction]:
    """Return what was asked, in order."""
    assert server.database is not None
    with reading(server.database) as connection:
        asked = interactions.list_since(connection, DEFAULT_POLICY, 0)
    return sorted(asked, key=lambda reply: reply.response_id)


def rated(server: Running) -> dict[str, bool]:
    """Return the thumbs that count, by reply: whether each is up."""
    assert server.database is not None
    with reading(server.database) as connection:
        found = feedback.list_rated(connection, DEFAULT_POLICY)
    return {reply.response_id: reply.value > 0 for reply in found}
