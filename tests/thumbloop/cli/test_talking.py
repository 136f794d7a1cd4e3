"""`thumbloop chat`."""

import asyncio
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from server.engine import Sampled
from tests.commands import ROOT, rated, replies
from tests.fakes import FakeEngine
from tests.serving import Running, running
from thumbloop import cli
from thumbloop.client import Client, GenerateOptions
from thumbloop.config import ServerConfig, State
from thumbloop.errors import Overloaded
from thumbloop.types import (
    FinishReason,
    Message,
    Prompt,
    Role,
    User,
)


class Person:
    """Asks these questions, and presses these keys after the answers."""

    def __init__(self, *said: tuple[str, str]) -> None:
        self._questions: Iterator[str] = iter([question for question, _ in said])
        self._keys = iter([key for _, key in said])

    def ask(self) -> str | None:
        return next(self._questions, None)

    def key(self) -> str:
        return next(self._keys)


async def converse(server: Running, person: Person, **options: Any) -> None:
    def talk() -> None:
        with Client(f"127.0.0.1:{server.port}") as client:
            cli.converse(client, GenerateOptions(**options), "ann", ask=person.ask, key=person.key)

    await asyncio.to_thread(talk)


async def test_a_conversation_remembers_what_was_said(
    server: Running, capsys: pytest.CaptureFixture[str]
):
    await converse(server, Person(("How was it?", "\r"), ("And the food?", "x")), num_candidates=2)
    first, second = replies(server)
    assert first.prompt == Prompt(messages=(Message(Role.USER, "How was it?"),))
    assert second.prompt.messages == (
        Message(Role.USER, "How was it?"),
        Message(Role.ASSISTANT, first.chosen.text),
        Message(Role.USER, "And the food?"),
    )
    assert first.user == second.user == User("", "ann")
    assert len(first.candidates) == 2
    shown = capsys.readouterr().out
    assert f"{first.chosen.text}\nversion 0; + or - to rate" in shown
    assert f"{second.chosen.text}\nversion 0" in shown
    assert rated(server) == []


class Speechless(FakeEngine):
    """Ends every reply at once."""

    def speak(self, *_arguments: Any) -> Sampled:
        return Sampled((int(self.tokenizer.eos_token_id),), (-0.1,), FinishReason.STOP)


async def test_a_conversation_goes_on_after_a_reply_without_words(tiny_model: Path, state: State):
    def make_engine(model: Path, _config: ServerConfig) -> FakeEngine:
        return Speechless(model)

    async with running(tiny_model, state, make_engine=make_engine) as server:
        await converse(server, Person(("How was it?", "\r"), ("And the food?", "\r")))
        first, second = replies(server)
    assert first.chosen.text == ""
    assert [turn.content for turn in second.prompt.messages] == ["How was it?", "", "And the food?"]


@pytest.mark.parametrize(
    ("key", "value"), [("+", 1), ("u", 1), ("-", 0), ("d", 0), ("\r", None), ("U", None)]
)
async def test_a_key_is_a_thumb(
    server: Running, capsys: pytest.CaptureFixture[str], key: str, value: int | None
):
    await converse(server, Person(("How was it?", key)))
    (reply,) = replies(server)
    expected = [] if value is None else [(reply.response_id, value, User("", "ann"))]
    assert [(r.response_id, r.value, r.user) for r in rated(server)] == expected
    last = capsys.readouterr().out.splitlines()[-1]
    assert (last in ("thumb up", "thumb down")) is (value is not None)


async def test_an_error_ends_a_conversation(server: Running):
    server.engine.is_full = True
    with pytest.raises(Overloaded):
        await converse(server, Person(("How was it?", "+")))


class Terminal:
    """A command with a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "thumbloop.cli", *arguments]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self._shown = ""

    def wait_for(self, text: str) -> None:
        """Read until this is shown, after what was waited for before."""
        while text not in self._shown:
            assert select.select([self._ours], [], [], 20)[0], self._shown
            self._shown += os.read(self._ours, 4096).decode()
        self._shown = self._shown.partition(text)[2]

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def press(self, key: str) -> None:
        """Type a key once the command waits for one: what was typed before that it throws away."""
        for _ in range(2000):
            if not termios.tcgetattr(self._ours)[3] & termios.ICANON:
                return self.type(key)
            time.sleep(0.01)
        raise AssertionError("the command does not wait for a key")

    def end(self) -> int:
        """Wait for the command's end; return its status."""
        return self._process.wait(20)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


async def test_chat_asks_the_terminal_until_there_is_nothing_more(server: Running):
    def talk() -> int:
        arguments = ("chat", "--user", "ann", "--address", f"127.0.0.1:{server.port}")
        with closing(Terminal(*arguments)) as terminal:
            for question, key, said in (("How was it?", "+", "up"), ("And the food?", "-", "down")):
                terminal.wait_for("> ")
                terminal.type(f"{question}\n")
                terminal.wait_for("to go on")
                terminal.press(key)
                terminal.wait_for(f"thumb {said}")
            terminal.wait_for("> ")
            terminal.type("\x04")
            return terminal.end()

    assert await asyncio.to_thread(talk) == 0
    first, second = replies(server)
    assert {first.user, second.user} == {User("", "ann")}
    assert first.prompt.messages[0].content == "How was it?"
    assert {r.response_id: r.value for r in rated(server)} == {
        first.response_id: 1,
        second.response_id: 0,
    }


async def test_chat_needs_a_terminal(thumbloop: Any):
    done = await thumbloop("chat")
    assert done.exit_code == 2
    assert done.stderr == "error: chat needs a terminal; see thumbloop generate\n"
