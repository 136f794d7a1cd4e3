"""The `thumbloop` command, against a server in this process."""

import asyncio
import hashlib
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from click.testing import Result
from typer.testing import CliRunner

from server.engine import Sampled
from tests.fakes import FakeEngine
from tests.publishing import publisher_of
from tests.rows import finished_round, version
from tests.serving import Running, running
from thumbloop import cli
from thumbloop.client import AsyncClient, Client, GenerateOptions
from thumbloop.config import ServerConfig, State, load
from thumbloop.errors import Overloaded, PermissionDenied, Unauthenticated
from thumbloop.store import deployments, feedback, interactions, reading
from thumbloop.store import versions as store_versions
from thumbloop.types import (
    DEFAULT_POLICY,
    FinishReason,
    Interaction,
    Message,
    Prompt,
    RatedReply,
    Role,
    Strategy,
    User,
    VersionState,
)

SETTINGS = {"settings": {"ppo": {"kl_coef": 0.125}}}
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDRESS", "TOKEN", "CA", "CERT", "KEY", "TLS"):
        monkeypatch.delenv(f"THUMBLOOP_{name}", raising=False)


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(folder=tmp_path / "state")


@pytest.fixture
async def server(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    async with running(tiny_model, state) as server:
        yield server


async def run(*arguments: str, **environment: str) -> Result:
    """Run the command in a thread, as the server needs this one."""
    runner = CliRunner(env=environment)
    return await asyncio.to_thread(runner.invoke, cli.app, list(arguments))


@pytest.fixture
def thumbloop(server: Running) -> Callable[..., Awaitable[Result]]:
    """Runs the command against the server."""

    async def thumbloop(*arguments: str) -> Result:
        return await run(*arguments, "--address", f"127.0.0.1:{server.port}")

    return thumbloop


def replies(server: Running) -> list[Interaction]:
    assert server.database is not None
    with reading(server.database) as connection:
        return interactions.list_since(connection, DEFAULT_POLICY, 0)


def rated(server: Running) -> list[RatedReply]:
    assert server.database is not None
    with reading(server.database) as connection:
        return feedback.list_rated(connection, DEFAULT_POLICY)


# Asking


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


# Rating


async def test_a_reply_is_rated(server: Running, thumbloop: Any):
    await thumbloop("generate", "hello", "--user", "ann")
    (stored,) = replies(server)
    rate = ("rate", stored.response_id)
    done = await thumbloop(*rate, "up", "--user", "ann", "--comment", "lovely")
    assert (done.exit_code, done.stdout) == (0, "feedback 1 for version 0\n")
    done = await thumbloop(*rate, "down", "--user", "ann")
    assert done.stdout == "feedback 2 for version 0\n"
    assert [(r.response_id, r.value) for r in rated(server)] == [(stored.response_id, 0)]


async def test_a_thumb_is_up_or_down(server: Running, thumbloop: Any):
    done = await thumbloop("rate", "r", "sideways")
    assert done.exit_code == 2
    assert "has to be up or down" in done.stderr


async def test_a_version_is_taken_back_and_promoted_again(
    server: Running, tiny_model: Path, state: State, thumbloop: Any
):
    assert server.database is not None
    publisher_of(server, tiny_model, state).publish(1)
    await server.serves(1)
    done = await thumbloop("rollback", "--reason", "it swears")
    assert (done.exit_code, done.stdout) == (0, "version 0 is current, version 1 is rolled back\n")
    done = await thumbloop("versions")
    assert "it swears" in done.stdout
    done = await thumbloop("promote", "1")
    assert (done.exit_code, done.stdout) == (0, "version 1 is current, version 0 is retired\n")
    done = await thumbloop("rollback", "0", "--expected", "0")
    assert done.exit_code == 1
    assert done.stderr == "error: version 0 is not current, version 1 is\n"
    done = await thumbloop("promote", "7", "--expected", "1")
    assert (done.exit_code, done.stderr) == (1, "error: there is no version 7\n")


async def test_versions_are_shown_with_their_states(thumbloop: Any):
    done = await thumbloop("versions")
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.stdout.splitlines() if re.match(r"│ 0 ", line)]
    assert "current" in row


async def test_where_a_version_comes_from_is_shown(
    server: Running, tiny_model: Path, state: State, thumbloop: Any
):
    assert server.database is not None
    reply = await server.generate("hello", user_id="ann")
    thumb = await server.client.rate(reply.response_id, up=True, user_id="ann")
    publisher = publisher_of(server, tiny_model, state)
    row = publisher.write(1, alter=lambda manifest: manifest.model_copy(update=SETTINGS))
    row = replace(row, feedback_count=31, first_feedback_id=5, last_feedback_id=44)
    assert row.round_id is not None
    used = {"new_feedback": (thumb.feedback_id,), "rollouts": (reply.response_id,)}
    with server.database.begin() as connection:
        done = finished_round(1, round_id=row.round_id, **used)
        store_versions.finish_round(connection, done, row)
    await server.serves(1)
    publisher.publish(2, 1)
    await server.serves(2)

    done = await thumbloop("lineage", "1")
    assert done.exit_code == 0, done.output
    rows = [re.split(r" *│ *", line)[1:-1] for line in done.stdout.splitlines() if "│" in line]
    assert rows == [
        ["1", "retired", "31", "5 to 44", "0", "1"],
        ["0", "retired", "0", "", "0", "0"],
    ]
    assert "learned from 31 thumbs and preferences, thumbs with ids in 5 to 44" in done.stdout
    assert '"kl_coef": 0.125' in done.stdout
    done = await thumbloop("lineage")
    assert re.search(r"│ 2 +│ current", done.stdout)
    assert "tainted" not in (await thumbloop("versions")).stdout

    done = await thumbloop("lineage", "--user", "ann")
    assert done.exit_code == 0, done.output
    assert re.search(r"│ 1 +│ 1 +│ 0 +│ 1 +│", done.stdout)
    assert "grown from them: 2\n" in done.stdout
    done = await thumbloop("lineage", "--user", "ann", "--subject", "another")
    assert done.stdout == "no version learned from this user\n"

    done = await thumbloop("forget", "ann", "--yes")
    assert done.exit_code == 0, done.output
    assert done.stdout == "erased 1 replies and 1 thumbs and preferences\ntainted versions: 1, 2\n"
    done = await thumbloop("versions")
    assert done.stdout.count("tainted") == 2
    done = await thumbloop("lineage")
    assert re.search(r"│ 1 +│ retired, tainted", done.stdout)
    assert not re.search(r"│ 0 +│ retired, tainted", done.stdout)


async def test_nobody_is_forgotten_by_mistake(server: Running, thumbloop: Any):
    await server.generate("hello", user_id="ann")
    done = await thumbloop("forget", "ann")  # nobody says yes
    assert done.exit_code == 1
    assert len(replies(server)) == 1
    assert (await thumbloop("forget")).exit_code == 2
    done = await thumbloop("forget", "bob", "--yes")
    assert done.stdout == "erased 0 replies and 0 thumbs and preferences\ntainted versions: none\n"
    assert len(replies(server)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("1", "--user", "ann"), "not both"), (("--subject", "x"), "needs a --user")],
)
async def test_lineage_is_of_a_version_or_of_a_user(
    thumbloop: Any, arguments: tuple[str, ...], words: str
):
    done = await thumbloop("lineage", *arguments)
    assert done.exit_code == 2
    assert words in done.stderr


async def test_a_version_whose_folder_was_deleted_is_shown_as_such(server: Running, thumbloop: Any):
    assert server.database is not None
    with server.database.begin() as connection:
        store_versions.finish_round(connection, finished_round(1), version(1))
        deployments.set_state(connection, "default", 1, VersionState.REJECTED, at=1.0)
        deployments.collect(connection, "default", 1, at=2.0, reason="")
    done = await thumbloop("versions")
    first, second = done.stdout.partition("│ 1 ")[2].splitlines()[:2]  # it is wrapped
    assert "rejected," in first
    assert "deleted" in second


# Talking


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


# Tokens


@pytest.mark.parametrize("subject", ["web-backend", "12", "yes", "a: b", "#x", "anna@example.org"])
async def test_a_new_token_gets_in_where_its_settings_are(
    tiny_model: Path, state: State, tmp_path: Path, subject: str
):
    done = await run("token", subject, "--scope", "generate", "--scope", "on_behalf")
    assert done.exit_code == 0, done.output
    secret = done.stdout.removesuffix("\n")
    assert len(secret) >= 32
    assert secret not in done.stderr
    assert hashlib.sha256(secret.encode()).hexdigest() in done.stderr
    file = tmp_path / "server.yaml"
    file.write_text(done.stderr)
    assert set(yaml.safe_load(done.stderr)) == {"access"}
    access = load(ServerConfig, file).access
    assert list(access.tokens) == [subject]
    async with running(tiny_model, state, access=access) as server:
        address = f"127.0.0.1:{server.port}"
        async with AsyncClient(address, token=secret) as client:
            reply = await client.generate("hello", user_id="ann")
            assert server.stored(reply.response_id).user == User(subject, "ann")
            with pytest.raises(PermissionDenied):
                await client.rate(reply.response_id, up=True, user_id="ann")
        async with AsyncClient(address, token=f"{secret}x") as client:
            with pytest.raises(Unauthenticated):
                await client.generate("hello")


async def test_no_two_tokens_are_alike():
    made = [await run("token", "ann", "--scope", "admin") for _ in range(5)]
    assert len({done.stdout for done in made}) == 5


@pytest.mark.parametrize("arguments", [("token", "ann"), ("token", "ann", "--scope", "root")])
async def test_a_token_is_for_something_that_is_known(arguments: tuple[str, ...]):
    done = await run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""


# TLS


class Papers:
    """A certificate with its key, and the authority that vouches for it, as PEM files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.certificate, self.key, self.authority = (
            folder / f"{name}-{what}.pem" for what in ("certificate", "key", "authority")
        )
        authority = trustme.CA()
        issued = authority.issue_cert(name)
        issued.cert_chain_pems[0].write_to_path(self.certificate)
        issued.private_key_pem.write_to_path(self.key)
        authority.cert_pem.write_to_path(self.authority)

    @property
    def listen(self) -> dict[str, Path]:
        return {"tls_certificate": self.certificate, "tls_key": self.key}


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Papers(tmp_path, "localhost")


async def test_the_command_shows_its_token_over_tls(tiny_model: Path, state: State, papers: Papers):
    done = await run("token", "ann", "--scope", "admin")
    secret = done.stdout.strip()
    access = yaml.safe_load(done.stderr)["access"]
    async with running(tiny_model, state, access=access, listen=papers.listen) as server:
        where = ("versions", "--address", f"localhost:{server.port}", "--ca", str(papers.authority))
        shown = await run(*where, THUMBLOOP_TOKEN=secret)
        assert shown.exit_code == 0, shown.output
        assert "current" in shown.stdout
        refused = await run(*where)
        assert refused.exit_code == 1
        assert refused.stderr == "error: send `authorization: Bearer <token>`, once\n"


async def test_the_command_shows_its_certificate(
    tiny_model: Path, state: State, tmp_path: Path, papers: Papers
):
    anns = Papers(tmp_path, "ann@example.org")
    listen = {**papers.listen, "tls_client_ca": anns.authority}
    async with running(tiny_model, state, listen=listen) as server:
        where = ("versions", "--address", f"localhost:{server.port}", "--ca", str(papers.authority))
        done = await run(*where, "--cert", str(anns.certificate), "--key", str(anns.key))
        assert done.exit_code == 0, done.output
        named = {"THUMBLOOP_CERT": str(anns.certificate), "THUMBLOOP_KEY": str(anns.key)}
        assert (await run(*where, **named)).exit_code == 0
        assert (await run(*where)).exit_code == 1


async def test_tls_without_authorities_trusts_the_public_ones(
    tiny_model: Path, state: State, papers: Papers
):
    async with running(tiny_model, state, listen=papers.listen) as server:
        command = [sys.executable, "-m", "thumbloop.cli", "versions"]
        command += ["--address", f"localhost:{server.port}"]
        public = os.environ | {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(papers.authority)}
        for arguments, environment in ((["--tls"], public), ([], public | {"THUMBLOOP_TLS": "1"})):
            done = await asyncio.create_subprocess_exec(
                *command, *arguments, env=environment, cwd=ROOT, stdout=PIPE, stderr=PIPE
            )
            _, said = await done.communicate()
            assert done.returncode == 0, said


def test_without_arguments_the_command_explains_itself():
    done = CliRunner().invoke(cli.app, [])
    for name in ("generate", "chat", "rate", "versions", "promote", "token", "export", "import"):
        assert name in done.output
