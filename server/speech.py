"""What the caller of a stream hears while its reply is made."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from server.concurrency import under_way
from thumbloop.errors import ReaderTooSlow

T = TypeVar("T")

_RETRY_AFTER_S = 1.0
_PIECE = 8192  # characters of one message; what a reader does not take of it stays in memory


class Speech:
    """A reply's text on its way to one reader: it only grows, and what was read is not said again.

    Nothing waits for the reader. One that has left more than `max_unread` characters unread when more
    comes loses the stream, so that nobody can fill the server's memory by not reading.
    """

    def __init__(self, max_unread: int) -> None:
        self.response_id = ""
        self.first_text_s = 0.0  # from the call to its first text
        self._max_unread = max_unread
        self._started = time.perf_counter()
        self._text = ""
        self._read = 0
        self._changed = asyncio.Event()

    def begin(self, response_id: str) -> None:
        """Say what the reply will be called."""
        self.response_id = response_id

    def say(self, text: str) -> None:
        """Take the reply's text so far; one that does not continue what was said changes nothing.

        Raises ReaderTooSlow.
        """
        if len(text) <= len(self._text) or not text.startswith(self._text):
            return
        if not self._text:
            self.first_text_s = time.perf_counter() - self._started
        if len(self._text) - self._read > self._max_unread:
            raise ReaderTooSlow(
                f"more than {self._max_unread} characters of this stream were not read",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._text = text
        self._changed.set()

    async def first(self, made: "asyncio.Future[Any]") -> None:
        """Wait until there is something to read. Raises what the making of the reply raises before."""
        made.add_done_callback(self._wake)
        while not self._text and not made.done():
            self._changed.clear()
            await self._changed.wait()
        if made.done():
            made.result()

    def _wake(self, _made: object) -> None:
        self._changed.set()

    async def deliver(
        self, made: "asyncio.Future[T]", write: Callable[[str], Awaitable[None]]
    ) -> T:
        """Write the text in pieces as it comes; return the whole reply, `made`, once it is there.

        Raises what the making of the reply raises, at once, even where a write is stuck.
        """
        async with under_way(self._write_all(made, write)) as writing:
            await asyncio.wait((made, writing), return_when=asyncio.FIRST_COMPLETED)
            if writing.done() or not _has_failed(made):
                await writing
        return await made

    async def _write_all(
        self, made: "asyncio.Future[Any]", write: Callable[[str], Awaitable[None]]
    ) -> None:
        made.add_done_callback(self._wake)
        while not made.done() or self._read < len(self._text):
            piece = self._text[self._read : self._read + _PIECE]
            self._read += len(piece)
            if piece:
                await write(piece)
            else:
                self._changed.clear()
                await self._changed.wait()


def _has_failed(made: "asyncio.Future[Any]") -> bool:
    return made.cancelled() or made.exception() is not None
