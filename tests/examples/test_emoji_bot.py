"""The emoji bot as a process, between a stand-in for Slack and a server with a fake engine, one of each for all tests."""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from examples.emoji_bot import thumb_of
from tests.examples import slack
from tests.examples.runs import ROOT, environment, rated, replies
from tests.examples.slack import BOT, SECRET, TOKEN, Workspace, send, signed
from tests.serving import Running, running, until
from thumbloop.config import State

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHANNEL = "C1"


@dataclass
class Talk:
    """A workspace with the bot in it, and ann, who talks."""

    server: Running
    workspace: Workspace
    bot: str
    replies: list[str] = field(default_factory=list)

    async def ask(self, **more: Any) -> str:
        """Have ann mention the bot; return the time stamp of its answer."""
        before = len(self.workspace.messages)
        text = f"<@{BOT}> How was the film?"
        event = {"type": "app_mention", "user": "ann", "text": text, "channel": CHANNEL, **more}
        assert await send(self.bot, event) == 200
        posts = await asyncio.to_thread(self.workspace.wait_for_posts, before + 1)
        self.replies.append(posts[-1]["metadata"]["event_payload"]["response_id"])
        return str(posts[-1]["ts"])

    async def react(self, ts: str, emoji: str, *, user: str = "ann", removed: bool = False) -> None:
        """Have somebody add a reaction to a message, or take it away."""
        message = self.workspace.messages[CHANNEL, ts]
        reaction = {"name": emoji, "users": [user]}
        others = [r for r in message["reactions"] if r != reaction]
        message["reactions"] = others if removed else [*others, reaction]
        event = {
            "type": "reaction_removed" if removed else "reaction_added",
            "user": user,
            "reaction": emoji,
            "item_user": BOT,
            "item": {"type": "message", "channel": CHANNEL, "ts": ts},
        }
        assert await send(self.bot, event) == 200

    def thumbs(self) -> list[bool | None]:
        """Return what was said of ann's replies, in order."""
        said = rated(self.server)
        return [said.get(reply) for reply in self.replies]

    async def come_to(self, *thumbs: bool | None) -> None:
        """Wait until these thumbs count."""
        await until(lambda: self.thumbs() == [*thumbs])


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server(tiny_model: Path, tmp_path_factory: Any) -> AsyncIterator[Running]:
    state = State(folder=tmp_path_factory.mktemp("state"))
    async with running(tiny_model, state) as server:
        yield server


@pytest.fixture(scope="module")
def workspace() -> Iterator[Workspace]:
    with slack.slack() as workspace:
        yield workspace


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def bot(server: Running, workspace: Workspace) -> AsyncIterator[str]:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    settings = {
        "SLACK_BOT_TOKEN": TOKEN,
        "SLACK_SIGNING_SECRET": SECRET,
        "SLACK_API_URL": workspace.url,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        ROOT / "examples/emoji_bot.py",
        *("--port", str(port)),
        env=environment(server, **settings),
    )
    try:
        await until(lambda: process.returncode is not None or _listens(port), 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


def _listens(port: int) -> bool:
    with closing(socket.socket()) as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def talk(server: Running, workspace: Workspace, bot: str) -> Talk:
    return Talk(server, workspace, bot)


async def test_a_mention_is_answered_by_the_policy(talk: Talk):
    ts = await talk.ask()
    stored = talk.server.stored(talk.replies[0])
    assert stored.prompt.messages[0].content == "How was the film?"
    assert (stored.user.user_id, stored.session_id) == ("ann", CHANNEL)
    assert talk.workspace.messages[CHANNEL, ts]["text"] == stored.chosen.text


async def test_a_direct_message_is_answered(talk: Talk):
    await talk.ask(type="message", channel_type="im", text="And the food?")
    stored = talk.server.stored(talk.replies[0])
    assert stored.prompt.messages[0].content == "And the food?"


@pytest.mark.parametrize(
    "more",
    [
        {"channel_type": "channel"},
        {"channel_type": "im", "subtype": "message_changed"},
        {"channel_type": "im", "bot_id": "B1"},
    ],
    ids=["said to others", "an edit", "another bot"],
)
async def test_what_nobody_said_to_the_bot_is_not_answered(talk: Talk, more: dict[str, str]):
    asked = len(replies(talk.server))
    event = {"type": "message", "user": "ann", "text": "hello", "channel": CHANNEL, **more}
    assert await send(talk.bot, event) == 200
    await talk.ask()
    assert len(replies(talk.server)) == asked + 1


@pytest.mark.parametrize(("emoji", "thumb"), [("+1", True), ("heart", True), ("-1", False)])
async def test_a_reaction_of_the_asker_is_a_thumb(talk: Talk, emoji: str, thumb: bool):
    await talk.react(await talk.ask(), emoji)
    await talk.come_to(thumb)


async def test_another_reaction_changes_the_thumb(talk: Talk):
    ts = await talk.ask()
    await talk.react(ts, "+1")
    await talk.come_to(True)
    await talk.react(ts, "-1")
    await talk.come_to(False)
    await talk.react(ts, "-1", removed=True)  # the thumb up is still there
    await talk.come_to(True)


async def test_a_reaction_that_is_taken_away_leaves_its_thumb(talk: Talk):
    first, second = await talk.ask(), await talk.ask()
    await talk.react(first, "-1")
    await talk.come_to(False, None)
    await talk.react(first, "-1", removed=True)
    await talk.react(second, "+1")
    await talk.come_to(False, True)


async def test_reactions_of_others_and_other_emoji_are_no_thumbs(talk: Talk):
    first, second = await talk.ask(), await talk.ask()
    await talk.react(first, "-1", user="bob")
    await talk.react(first, "eyes")
    await talk.react(second, "+1")
    await talk.come_to(None, True)


async def test_an_event_that_slack_sends_again_counts_once(talk: Talk):
    asked = len(replies(talk.server))
    event = {"type": "app_mention", "user": "ann", "text": "hi", "channel": CHANNEL}
    for _ in range(2):
        before = len(talk.workspace.messages)
        assert await send(talk.bot, event, event_id="EvAgain") == 200
        await asyncio.to_thread(talk.workspace.wait_for_posts, before + 1)
    assert len(replies(talk.server)) == asked + 1


@pytest.mark.parametrize("how", [{"secret": "another"}, {"age_s": 3600}], ids=["forged", "old"])
async def test_what_slack_did_not_sign_is_refused(talk: Talk, how: dict[str, Any]):
    posts = len(talk.workspace.messages)
    event = {"type": "app_mention", "user": "ann", "text": "hi", "channel": CHANNEL}
    assert await send(talk.bot, event, **how) == 401
    await talk.ask()
    assert len(talk.workspace.messages) == posts + 1


async def test_slack_finds_its_own_challenge_answered(bot: str):
    asked = signed({"type": "url_verification", "challenge": "c"})
    async with httpx2.AsyncClient() as client:
        answer = await client.post(f"{bot}/slack/events", **asked)
    assert answer.json() == {"challenge": "c"}


async def test_an_emoji_means_the_same_in_every_skin_tone():
    assert (thumb_of("+1::skin-tone-4"), thumb_of("thumbsdown"), thumb_of("eyes")) == (
        True,
        False,
        None,
    )
