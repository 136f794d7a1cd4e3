"""The command line: a prompt is answered, and what is wrong is said in one line."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.commands import replies, run
from tests.serving import Running
from thumbloop import cli
from thumbloop.types import (
    Message,
    Prompt,
    Role,
    Strategy,
    User,
)


async def test_a_prompt_is_answered_and_the_facts_stand_apart(server: Running, thumbloop: Any):
    done = await thumbloop("generate", "How was it?", "--user", "ann")
    assert done.exit_code == 0, done.output
    (stored,) = replies(server)
    assert done.stdout == f"{stored.chosen.text}\n"
    assert done.stderr == f"{stored.response_id}: version 0, chosen from 4\n"
    assert stored.prompt == Prompt(messages=(Message(Role.USER, "How was it?"),))
    assert stored.user == User("", "ann")


async def test_options_are_passed_on(server: Running, thumbloop: Any):
    options = ("--strategy", "best_of_n", "-n", "2", "--max-tokens", "3", "--text")
    done = await thumbloop("generate", "The soup was", *options)
    assert done.exit_code == 0, done.output
    (stored,) = replies(server)
    assert stored.prompt == Prompt(text="The soup was")
    assert stored.strategy == Strategy.BEST_OF_N
    assert (len(stored.candidates), stored.sampling.max_tokens) == (2, 3)


async def test_where_the_server_is_may_stand_in_the_environment(server: Running):
    done = await run("generate", "hello", THUMBLOOP_ADDRESS=f"127.0.0.1:{server.port}")
    assert done.exit_code == 0, done.output
    assert len(replies(server)) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "hello", "--strategy", "worst"), "guidance.strategy_name: worst is not"),
        (("generate", "hello", "-n", "0"), "guidance.num_candidates: has to be in [1, 16]"),
        (("generate", " "), "chat.messages[0].content: is empty"),
        (("rate", "never-given", "up"), "there is no such response"),
    ],
)
async def test_what_is_refused_is_said_in_one_line(
    thumbloop: Any, arguments: tuple[str, ...], said: str
):
    done = await thumbloop(*arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1


async def test_a_server_that_is_not_there_is_said_in_one_line(tmp_path: Path):
    done = await run("versions", "--address", f"unix:{tmp_path}/nobody")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--ca", "--cert", "--key"])
async def test_a_file_that_cannot_be_read_is_said_in_one_line(tmp_path: Path, option: str):
    there, nowhere = tmp_path / "there.pem", tmp_path / "nowhere.pem"
    there.touch()
    files = {"--ca": there, "--cert": there, "--key": there, option: nowhere}
    done = await run("versions", *(str(part) for pair in files.items() for part in pair))
    assert done.exit_code == 1
    assert done.stderr == f"error: {option}: {nowhere} cannot be read: No such file or directory\n"


@pytest.mark.parametrize("option", ["--cert", "--key"])
async def test_a_certificate_and_its_key_come_together(tmp_path: Path, option: str):
    done = await run("versions", option, str(tmp_path / "alone.pem"))
    assert done.exit_code == 1
    assert done.stderr == "error: --cert and --key need each other\n"


def test_without_arguments_the_command_explains_itself():
    done = CliRunner().invoke(cli.app, [])
    for name in ("generate", "chat", "rate", "versions", "promote", "token", "export", "import"):
        assert name in done.output
