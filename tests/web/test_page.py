"""The page in Chromium, on a server with a fake engine: what a rater does is what the store holds."""

import asyncio
import re
from pathlib import Path
from time import time
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.async_api import Browser, Request, expect
from sqlalchemy import select

from tests.browsing import PHONE, Rater, page_of, rating, showing
from tests.over_http import Halting
from tests.publishing import Publisher
from tests.serving import Running, running
from thumbloop.config import State
from thumbloop.errors import Overloaded
from thumbloop.store import feedback, preferences, reading
from thumbloop.store.schema import feedback as events
from thumbloop.store.schema import interactions
from thumbloop.types import DEFAULT_POLICY, User
from web import page

pytestmark = pytest.mark.asyncio(loop_scope="session")

ANN = User("", "ann")


def thumbs(server: Running) -> list[tuple[User, int]]:
    assert server.database is not None
    with reading(server.database) as connection:
        rated = feedback.list_rated(connection, DEFAULT_POLICY)
    return [(one.user, one.value) for one in rated]


def values(server: Running) -> list[tuple[str, int]]:
    """Return what every event of feedback said, oldest first."""
    assert server.database is not None
    with reading(server.database) as connection:
        rows = connection.execute(
            select(events.c.response_id, events.c.value).order_by(events.c.id)
        )
        return [(reply, value) for reply, value in rows]


def who_asked(server: Running) -> list[tuple[User, str]]:
    """Return the user and the session of every reply, oldest first."""
    assert server.database is not None
    columns = (interactions.c.subject, interactions.c.user_id, interactions.c.session_id)
    with reading(server.database) as connection:
        rows = connection.execute(select(*columns).order_by(interactions.c.created_at))
        return [(User(subject, name), session) for subject, name, session in rows]


def last_reply(server: Running) -> str:
    assert server.database is not None
    with reading(server.database) as connection:
        newest = (
            select(interactions.c.response_id).order_by(interactions.c.created_at.desc()).limit(1)
        )
        return str(connection.execute(newest).scalar_one())


def picks(server: Running) -> list[tuple[int, int]]:
    assert server.database is not None
    with reading(server.database) as connection:
        compared = preferences.list_compared(connection, DEFAULT_POLICY)
    return [(one.better.index, one.worse.index) for one in compared]


def comments(server: Running) -> list[tuple[int, str]]:
    assert server.database is not None
    with reading(server.database) as connection:
        rows = connection.execute(select(events.c.value, events.c.comment).order_by(events.c.id))
        return [(value, comment) for value, comment in rows if comment]


async def test_a_rater_asks_reads_rates_and_thinks_again(server: Running, rater: Rater):
    await rater.ask("How was the film?")
    await rater.hears(1)
    await expect(rater.said_by("version 0")).to_be_visible()
    await expect(rater.box).to_have_value("")
    await rater.rates("Like", reads="Thumb up stored.")
    assert thumbs(server) == [(ANN, 1)]
    await rater.screenshot("rated")
    await rater.rates("Dislike", reads="Thumb down stored.")
    assert thumbs(server) == [(ANN, 0)]
    await rater.page.get_by_label("Comment", exact=True).fill("too short")
    await rater.button("Add").click()
    await rater.reads("Comment stored.")
    assert comments(server) == [(0, "too short")]
    assert thumbs(server) == [(ANN, 0)]


async def test_a_reply_of_one_candidate_is_read_as_it_grows(
    tiny_model: Path, state: State, browser: Browser
):
    def halting(model: Path, _config: object) -> Halting:
        return Halting(model)

    alone = {"num_candidates": 1}
    async with (
        running(tiny_model, state, make_engine=halting, guidance=alone) as server,
        page_of(server) as address,
        rating(browser, address) as rater,
    ):
        await rater.open()
        await rater.ask("How was it?")
        await expect(rater.replies).to_contain_text(re.compile(r"\w"))
        begun = (await rater.replies.inner_text()).strip()
        assert not await rater.said_by("version").count()
        server.engine.may_go_on.set()
        await rater.hears(1)
        whole = await rater.replies.inner_text()
        assert whole.startswith(begun)
        assert len(whole) > len(begun)


async def test_the_thumb_of_an_earlier_reply_can_be_changed(server: Running, rater: Rater):
    for count, question in enumerate(("First?", "Second?"), start=1):
        await rater.ask(question)
        await rater.hears(count)
    await rater.rates("Like", reply=1, reads="Thumb up stored.")
    await rater.rates("Dislike", reply=0, reads="Thumb down stored.")
    stored = {server.stored(row[0]).prompt.messages[-1].content: row[1] for row in values(server)}
    assert stored == {"First?": 0, "Second?": 1}
    before = values(server)
    await rater.rates("Like", reply=1, reads="Thumb up stored.")  # it is pressed already
    await expect(rater.thumb("Like", reply=1)).to_have_attribute("aria-label", "Liked")
    assert values(server) == before


async def test_of_two_replies_one_is_picked_and_then_the_other(server: Running, rater: Rater):
    await rater.page.get_by_label("Show two, pick one").check()
    await rater.ask("How was the food?")
    await expect(rater.pair).to_be_visible()
    await rater.button("Pick first").click()
    await rater.reads("Stored.")
    await expect(rater.button("✓ First picked")).to_be_visible()
    assert picks(server) == [(0, 1)]
    await rater.screenshot("compared")
    await rater.button("Pick second").click()
    await expect(rater.button("✓ Second picked")).to_be_visible()
    assert picks(server) == [(1, 0)]
    better = await rater.pair.locator(".candidate").nth(1).locator("p").inner_text()
    await rater.page.get_by_label("Show two, pick one").uncheck()
    await rater.ask("And the wine?")
    await rater.hears(2)
    await expect(rater.said_by("picked of two")).to_be_visible()
    said = [m.content for m in server.stored(last_reply(server)).prompt.messages]
    assert said[1].split() == better.split()


async def test_undoing_goes_on_from_before_with_the_question_in_the_box(
    server: Running, rater: Rater
):
    await rater.ask("How was it?")
    await rater.hears(1)
    await rater.button("Undo").click()
    await expect(rater.replies).to_have_count(0)
    await expect(rater.box).to_have_value("How was it?")
    await rater.ask("How was it, really?")
    await rater.hears(1)
    asked = server.stored(last_reply(server)).prompt.messages
    assert [message.content for message in asked] == ["How was it, really?"]


async def test_a_reload_keeps_the_conversation_its_thumbs_and_the_user(
    server: Running, browser: Browser, address: str
):
    async with rating(browser, address) as rater:
        await rater.open()
        await rater.ask("How was it?")
        await rater.hears(1)
        await rater.rates("Like", reads="Thumb up stored.")
        await rater.open()
        await rater.hears(1)
        await expect(rater.thumb("Like")).to_have_attribute("aria-label", "Liked")
        await rater.ask("And then?")
        await rater.hears(2)
        await rater.button("New").click()
        await expect(rater.replies).to_have_count(0)
        await rater.ask("Who am I?")
        await rater.hears(1)
    users, sessions = zip(*who_asked(server), strict=True)
    assert len(set(users)) == 1
    assert users[0].user_id.startswith("web-")
    assert sessions[0] == sessions[1] != sessions[2]


async def test_nobody_waits_for_another_raters_reply(
    server: Running, rater: Rater, browser: Browser, address: str
):
    async with rating(browser, address) as bob:
        await bob.open("?user=bob")
        server.engine.may_sample.clear()
        await rater.ask("How was it?")
        await bob.ask("How was it?")
        await server.sampling(8)  # four candidates for each
        server.engine.may_sample.set()
        await rater.hears(1)
        await bob.hears(1)
    assert {user.user_id for user, _ in who_asked(server)} == {"ann", "bob"}


async def test_the_keyboard_is_enough(server: Running, rater: Rater):
    keys = rater.page.keyboard
    await expect(rater.box).to_be_focused()
    await keys.type("How was it?")
    await keys.press("Enter")
    await rater.hears(1)
    await tab_to(rater, "Dislike", backwards=True)
    await rater.screenshot("keyboard")
    await keys.press("Enter")
    await rater.reads("Thumb down stored.")
    await tab_to(rater, "Like", backwards=True)
    await keys.press("Enter")
    await rater.reads("Thumb up stored.")
    assert thumbs(server) == [(ANN, 1)]
    await tab_to(rater, "Undo")
    await keys.press("Enter")
    await expect(rater.replies).to_have_count(0)


async def tab_to(rater: Rater, name: str, *, backwards: bool = False) -> None:
    """Press Tab until what is focused has this name, and can be seen to be focused."""
    look = """() => {
        const at = document.activeElement, style = getComputedStyle(at);
        const width = style.outlineStyle == 'none' ? 0 : parseFloat(style.outlineWidth);
        return [at.ariaLabel || at.innerText, width];
    }"""
    for _ in range(30):
        await rater.page.keyboard.press("Shift+Tab" if backwards else "Tab")
        focused, outline = await rater.page.evaluate(look)
        if focused.strip().removesuffix("d") == name:
            assert outline >= 2
            return
    raise AssertionError(f"Tab does not lead to {name}")


async def test_it_fits_a_phone_and_a_thumb(server: Running, browser: Browser, address: str):
    async with rating(browser, address, PHONE) as rater:
        await rater.open("?user=ann")
        await rater.ask("How was it?")
        await rater.hears(1)
        await rater.rates("Like", reads="Thumb up stored.")
        for target in (rater.thumb("Like"), rater.thumb("Dislike"), rater.button("Send")):
            box = await target.bounding_box()
            assert box is not None
            assert min(box["width"], box["height"]) >= 44
        assert await rater.page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        await rater.screenshot("phone")
        await rater.page.get_by_label("Show two, pick one").check()
        await rater.ask("And the food?")
        await expect(rater.button("Pick first")).to_be_visible()
        assert await rater.page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        await rater.screenshot("phone_compared")
    assert thumbs(server) == [(ANN, 1)]


async def test_what_was_typed_is_there_until_the_server_is(
    tiny_model: Path, state: State, browser: Browser
):
    async with running(tiny_model, state) as server:
        port = server.port
    async with (
        showing(f"127.0.0.1:{port}", "127.0.0.1:9") as address,
        rating(browser, address) as rater,
    ):
        await rater.open()
        await rater.ask("How was it?")
        await rater.reads("The server does not answer now.")
        await expect(rater.box).to_have_value("How was it?")
        await expect(rater.replies).to_have_count(0)
        await rater.page.get_by_role("tab", name="Versions").click()
        await expect(rater.page.locator("#note")).to_contain_text("does not answer now")
        await rater.page.get_by_role("tab", name="Chat").click()
        async with running(tiny_model, state, listen={"port": port}):
            while not await rater.said_by("version 0").count():
                await rater.box.press("Enter")
                await rater.page.wait_for_timeout(1000)
            await expect(rater.box).to_have_value("")


async def test_a_busy_server_says_when_to_come_back(server: Running, rater: Rater):
    server.engine.is_full = True
    await rater.ask("How was it?")
    await rater.reads("The server is busy. Try again in a second.")
    await expect(rater.box).to_have_value("How was it?")


async def test_what_the_server_refuses_is_said_in_its_words(server: Running, rater: Rater):
    await rater.ask("How was it? " * 200)
    await rater.reads("The server cannot answer this: ")
    assert thumbs(server) == []


async def test_versions_swap_under_a_conversation(
    server: Running, publisher: Publisher, rater: Rater
):
    server.engine.may_sample.clear()
    await rater.ask("Who are you?")
    await server.sampling(4)
    publisher.publish(1)
    server.engine.may_sample.set()  # probes sample, too
    await server.serves(1)
    await rater.hears(1)
    await rater.ask("And now?")
    await rater.hears(2)
    await expect(rater.said_by("version 0")).to_be_visible()
    await expect(rater.said_by("version 1")).to_be_visible()
    publisher.publish(2, 1)
    await server.serves(2)
    await rater.rates("Like", reply=0, reads="Thumb up stored.")
    await rater.ask("And then?")
    await rater.hears(3)
    await expect(rater.said_by("version 2")).to_be_visible()
    assert [server.stored(reply).policy_version for reply, _ in values(server)] == [0]
    await rater.page.get_by_role("tab", name="Versions").click()
    versions = rater.page.locator("#versions")
    await expect(versions.locator("tbody tr")).to_have_count(3)
    await expect(versions.locator("tbody tr").first).to_contain_text("current")
    await expect(versions.locator("tbody tr").nth(1)).to_contain_text("retired")
    await expect(rater.page.locator("#decisions tbody tr").first).to_contain_text("attested")
    await expect(rater.page.locator("#likings")).to_contain_text("100% of 1")
    await rater.screenshot("versions")


async def test_a_page_has_one_stream_of_events_for_as_long_as_it_is_open(rater: Rater):
    """One that Gradio closes between two events loses what is begun before the page hears of that."""
    streams: list[str] = []

    def note(request: Request) -> None:
        if "/queue/data" in request.url:
            streams.append(request.url)

    rater.page.on("request", note)
    for count, question in enumerate(("First?", "Second?"), start=1):
        await rater.ask(question)
        await rater.hears(count)
    await rater.rates("Like", reads="Thumb up stored.")
    await rater.page.get_by_role("tab", name="Versions").click()
    await expect(rater.page.locator("#versions tbody tr")).to_have_count(1)
    assert streams == []


async def test_what_keeps_the_stream_open_ends_with_the_page(
    server: Running, browser: Browser, monkeypatch: pytest.MonkeyPatch
):
    slept: list[float] = []

    async def sleep(_seconds: float) -> None:
        await asyncio.sleep(0.05)
        slept.append(time())

    monkeypatch.setattr(page, "asyncio", SimpleNamespace(sleep=sleep))
    async with page_of(server) as address:
        async with rating(browser, address) as rater:
            await rater.open()
            while len(slept) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        while time() - slept[-1] < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_what_is_to_leave_the_machine_is_seen(browser: Browser, address: str):
    async with rating(browser, address) as rater:
        await rater.open()
        await rater.page.evaluate("fetch('http://192.0.2.1/').catch(() => 0)")
        assert rater.left == ["http://192.0.2.1/"]
        rater.left.clear()  # which is meant here


async def test_what_is_typed_while_a_reply_fails_is_there_as_well(
    server: Running, rater: Rater, monkeypatch: pytest.MonkeyPatch
):
    async def fail(*_arguments: Any, **_options: Any) -> None:
        await server.engine.may_sample.wait()
        raise Overloaded("full", retry_after_s=2)

    monkeypatch.setattr(server.engine, "sample", fail)
    server.engine.may_sample.clear()
    await rater.ask("How was it?")
    await expect(rater.button("Send")).to_be_disabled()
    await expect(rater.button("Undo")).to_be_disabled()
    await rater.box.fill("And then?")
    server.engine.may_sample.set()
    await rater.reads("The server is busy. Try again in 2 seconds.")
    await expect(rater.box).to_have_value("How was it?\nAnd then?")
    await expect(rater.button("Send")).to_be_enabled()


async def test_a_thumb_that_was_not_taken_does_not_look_as_if(server: Running, rater: Rater):
    await rater.ask("How was it?")
    await rater.hears(1)
    await server.client.forget("ann")
    await rater.thumb("Like").click()
    await rater.reads("The server does not know this reply")
    await expect(rater.thumb("Like")).to_have_attribute("aria-label", "Like")
    assert thumbs(server) == []
