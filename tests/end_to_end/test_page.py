"""The page for raters on a server with the real engine: a conversation, a thumb, and a swap under it."""

import pytest
from playwright.async_api import expect

from tests.browsing import chromium, page_of, rating
from tests.publishing import Publisher
from tests.serving import Running
from thumbloop.store import feedback, reading
from thumbloop.types import DEFAULT_POLICY, User

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_conversation_goes_on_while_versions_swap_under_it(
    server: Running, publisher: Publisher
):
    async with (
        chromium() as browser,
        page_of(server) as address,
        rating(browser, address) as rater,
    ):
        await rater.open("?user=ann")
        await rater.ask("What did you think of the film?")
        await rater.hears(1)
        publisher.publish(1)
        await server.serves(1)
        await rater.ask("And the food?")
        await rater.hears(2)
        await expect(rater.said_by("version 0")).to_be_visible()
        await expect(rater.said_by("version 1")).to_be_visible()
        for place, name in enumerate(("Like", "Dislike")):
            await rater.thumb(name, reply=place).click()
            await expect(rater.thumb(name, reply=place)).to_have_attribute("aria-label", f"{name}d")
    assert server.database is not None
    with reading(server.database) as connection:
        rated = feedback.list_rated(connection, DEFAULT_POLICY)
    assert [(one.user, one.policy_version, one.value) for one in rated] == [
        (User("", "ann"), 0, 1),
        (User("", "ann"), 1, 0),
    ]
