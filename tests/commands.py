"""The command line of clients, in this process."""

import asyncio
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from tests.serving import Running
from thumbloop import cli
from thumbloop.store import feedback, interactions, reading
from thumbloop.types import DEFAULT_POLICY, Interaction, RatedReply

ROOT = Path(__file__).parents[1]


async def run(*arguments: str, **environment: str) -> Result:
    """Run the command in a thread, as the server needs this one."""
    runner = CliRunner(env=environment)
    return await asyncio.to_thread(runner.invoke, cli.app, list(arguments))


def replies(server: Running) -> list[Interaction]:
    assert server.database is not None
    with reading(server.database) as connection:
        return interactions.list_since(connection, DEFAULT_POLICY, 0)


def rated(server: Running) -> list[RatedReply]:
    assert server.database is not None
    with reading(server.database) as connection:
        return feedback.list_rated(connection, DEFAULT_POLICY)
