"""The page for raters on a free port, and somebody who uses it in Debian's Chromium."""

import asyncio
import re
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from playwright.async_api import Browser, Locator, Page, async_playwright, expect

from tests.serving import Running
from thumbloop.client import AsyncClient
from web.page import application

SCREENSHOTS = Path(__file__).parents[1] / "runs/web"
PHONE = (375, 667)
DESK = (1000, 800)
PATIENCE_MS = 60_000  # for machines that do much else

expect.set_options(timeout=PATIENCE_MS)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Start the browser, and end it afterwards."""
    path = shutil.which("chromium")
    assert path, "chromium is missing: scripts/packages chromium"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        await browser.close()


@asynccontextmanager
async def showing(server: str, metrics: str) -> AsyncIterator[str]:
    """Serve the page of a server; return its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    async with AsyncClient(server, timeout_s=30) as client:
        config = uvicorn.Config(
            application(client, metrics), log_level="critical", timeout_graceful_shutdown=1
        )
        page = uvicorn.Server(config)
        serving = asyncio.create_task(page.serve(sockets=[listening]))
        try:
            yield "http://{}:{}".format(*listening.getsockname())
        finally:
            page.should_exit = True
            await serving


def page_of(server: Running) -> AbstractAsyncContextManager[str]:
    """Serve the page of a server in this process; return its address."""
    return showing(f"127.0.0.1:{server.port}", f"127.0.0.1:{server.application.metrics_port}")


class Rater:
    """Somebody with a browser of their own; whatever is to leave this machine is stopped, and counted."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address
        self.left: list[str] = []
        self.box = page.get_by_label("Message", exact=True)
        self.replies = page.locator("#said .bot.message")
        self.notice = page.locator("#notice")
        self.pair = page.locator("#pair")

    async def open(self, query: str = "") -> None:
        await self.page.context.route(re.compile(".*"), self._stay)
        await self.page.goto(f"{self.address}/{query}", timeout=PATIENCE_MS)
        await expect(self.box).to_be_editable()
        await expect(
            self.page.locator("#notice p")
        ).to_be_attached()  # what the browser kept is shown

    async def _stay(self, route: Any) -> None:
        at = urlsplit(route.request.url)
        if at.scheme in ("http", "https", "ws") and f"http://{at.netloc}" != self.address:
            self.left.append(route.request.url)
            await route.abort()
        else:
            await route.continue_()

    async def ask(self, question: str) -> None:
        """Ask; while the page still ends what was asked before, Enter does nothing."""
        await self.box.fill(question)
        while True:
            await self.box.press("Enter")
            with suppress(AssertionError):
                await expect(self.box).not_to_have_value(question, timeout=3000)
                return

    async def hears(self, count: int) -> None:
        """Wait until so many replies are whole: only then they say which version they are from."""
        await expect(self.said_by("version")).to_have_count(count)

    def said_by(self, words: str) -> Locator:
        return self.page.locator("#said").get_by_text(words)

    async def reads(self, words: str) -> None:
        await expect(self.notice).to_contain_text(words)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def thumb(self, name: str, reply: int = 0) -> Locator:
        """Return the thumb of a reply: "Like" or "Dislike", or pressed "Liked" or "Disliked"."""
        label = re.compile(rf"^{name}d?$")
        return self.page.locator("#said").get_by_role("button", name=label).nth(reply)

    async def rates(self, name: str, reply: int = 0, *, reads: str) -> None:
        """Press a thumb until the page says so: one that is busy may not hear of the first time."""
        while reads not in await self.notice.inner_text():
            await self.thumb(name, reply).click()
            with suppress(AssertionError):
                await expect(self.notice).to_contain_text(reads, timeout=5000)

    async def screenshot(self, name: str) -> None:
        """Keep what is seen; the files stay after the tests."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        await self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


@asynccontextmanager
async def rating(
    browser: Browser, address: str, size: tuple[int, int] = DESK
) -> AsyncIterator[Rater]:
    """Open a browser that nobody used before; nothing that it does may leave this machine."""
    context = await browser.new_context(viewport={"width": size[0], "height": size[1]})
    rater = Rater(await context.new_page(), address)
    yield rater
    await context.close()
    assert not rater.left, "requests left the machine"
