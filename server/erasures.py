"""Forgetting users: their rows at once, and behind that whatever is left of them in the store's files."""

import asyncio
import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from server.access import Caller
from server.stored import ask
from server.users import user_to_forget
from thumbloop.errors import StoreUnavailable
from thumbloop.store import GroupWriter, erasure, scrubbing
from thumbloop.store.erasure import Erasure
from thumbloop.types import DEFAULT_POLICY, User
from thumbloop.v1 import feedback_pb2

log = logging.getLogger(__name__)

GATHER_S = 2.0
"""How long more erasures are waited for, so that many cost the files one rewriting."""
_FIRST_PATIENCE_S, _MOST_PATIENCE_S = 0.1, 5.0  # for which readers may keep all writers waiting
_RESTS = 4  # times as long as writers were kept waiting, until they are again
_MOST_REST_S = 20.0
_RETRY_S = 5.0
_SELF = "user"  # who had their own data erased is not named


class Forgotten(NamedTuple):
    """What was erased, and since when that is durable, in unix seconds."""

    erasure: Erasure
    at: float


class Erasures:
    """Erases users' data; `watch` has to run for files to be rid of it, too."""

    def __init__(self, database: Database, writer: GroupWriter) -> None:
        self._database = database
        self._writer = writer
        self._asked = asyncio.Event()
        self._asked.set()  # a server that was killed may have left something to do
        self._took_s = 0.0
        self.is_scrubbed = False
        """Whether no file of the store holds anything of what was erased, as far as that is ours to say."""

    async def forget(
        self, message: feedback_pb2.DeleteUserDataRequest, caller: Caller
    ) -> Forgotten:
        """Erase what is stored of a user; it is durable when this returns.

        Raises PermissionDenied, InvalidRequest, StoreUnavailable.
        """
        user = user_to_forget(message, caller)
        actor = _actor(caller, user)
        now = time.time()

        def change(connection: Connection) -> Erasure:
            return erasure.erase(connection, DEFAULT_POLICY, user, at=now, actor=actor)

        done = await self._writer.run(change)
        if done.interactions:
            log.info(
                "a user was forgotten: %d replies; tainted versions: %s",
                done.interactions,
                ", ".join(map(str, done.tainted)) or "none",
            )
            self.is_scrubbed = False
            self._asked.set()
        return Forgotten(done, time.time())

    async def watch(self) -> None:
        """Scrub the files after erasures until cancelled; a database that does not answer is waited for."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            try:
                await self._scrub()
            except StoreUnavailable as error:
                log.warning(
                    "what was erased is still in the store's files: %s; trying again", error
                )
                self._asked.set()
                await asyncio.sleep(_RETRY_S)

    async def _scrub(self) -> None:
        if not scrubbing.leaves_remains(self._database):
            self.is_scrubbed = True
            return
        if await ask(self._database, erasure.unscrubbed) is not None:
            await asyncio.sleep(rest_s(self._took_s))
            await self._scrub_up_to(await ask(self._database, erasure.unscrubbed))
        self.is_scrubbed = await ask(self._database, erasure.unscrubbed) is None

    async def _scrub_up_to(self, event: int | None) -> None:
        """Rid the files of all that was erased up to an event."""
        assert event is not None, "nobody else scrubs"
        began = time.perf_counter()
        await self._writer.run_alone(scrubbing.rewrite)
        self._took_s = time.perf_counter() - began
        for patience_s in _patience():
            if await self._writer.run_alone(partial(scrubbing.empty_log, patience_s=patience_s)):
                break
            await asyncio.sleep(_RESTS * patience_s)
        now = time.time()
        await self._writer.run(
            lambda connection: erasure.scrubbed(connection, DEFAULT_POLICY, event, at=now)
        )
        seconds = time.perf_counter() - began
        log.info("no file of the store holds what was erased; took %.1f s", seconds)


def rest_s(took_s: float) -> float:
    """Return how long files are left alone after a rewriting that took so long: whoever erases on and on keeps writers
    waiting for a fifth of the time, as long as that keeps to a minute."""
    return max(GATHER_S, min(_RESTS * took_s, _MOST_REST_S))


def _patience() -> Iterator[float]:
    """Yield how long writers are kept waiting for readers, time after time."""
    patience_s = _FIRST_PATIENCE_S
    while True:
        yield patience_s
        patience_s = min(2 * patience_s, _MOST_PATIENCE_S)


def _actor(caller: Caller, user: User) -> str:
    """Return who asked, for the event log, which is not to name whom it forgot."""
    is_itself = caller.subject and user == User(caller.subject)
    return _SELF if is_itself else caller.subject or "operator"
