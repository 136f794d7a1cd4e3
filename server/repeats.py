"""Retries: a request id names one request of its user, and all who send it get the same reply."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sqlalchemy import Engine as Database

from thumbloop.config.server import Limits
from thumbloop.errors import Overloaded, RequestIdTaken
from thumbloop.store import interactions, reading
from thumbloop.types import Interaction, User
from thumbloop.v1 import policy_pb2

_TAKEN = "request_id: was used for another request; a new request needs a new one"


def digest_of(message: policy_pb2.GenerateRequest) -> str:
    """Return the sha256, in hexadecimal, of all a request says but its id."""
    body = policy_pb2.GenerateRequest()
    body.CopyFrom(message)
    body.ClearField("request_id")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest()


@dataclass(slots=True)
class _Running:
    digest: str
    reply: "asyncio.Future[Interaction | None]"  # None: it came to nothing
    waiting: int = 0


class Repeats:
    """Answers each request id of a user once: what is stored is returned, what runs is waited for.

    One that failed or was given up left nothing, and its retry is answered anew.
    """

    def __init__(self, database: Database, limits: Limits) -> None:
        self._database = database
        self._limits = limits
        # A look into SQLite's index takes a tenth of what handing it to another thread does.
        self._is_at_hand = database.dialect.name == "sqlite"
        self._running: dict[tuple[User, str], _Running] = {}

    async def once(
        self,
        user: User,
        request_id: str,
        digest: str,
        answer: Callable[[], Awaitable[Interaction]],
        on_repeat: Callable[[], None] = lambda: None,
    ) -> Interaction:
        """Return the reply to this request, made by `answer` unless there is one.

        `on_repeat` may raise where there is one, or one is made already.
        Raises RequestIdTaken: the id is another request's. Overloaded: too many wait for the same reply.
        And what `answer` raises.
        """
        key = (user, request_id)
        while (running := self._running.get(key)) is not None:
            if running.digest != digest:
                raise RequestIdTaken(_TAKEN)
            on_repeat()
            if (reply := await self._wait_for(running)) is not None:
                return reply
        running = _Running(digest, asyncio.get_running_loop().create_future())
        self._running[key] = running
        reply = None
        try:
            reply = await self._look_up(user, request_id)
            if reply is None:
                reply = await answer()
            elif reply.request_digest == digest:
                on_repeat()
            else:
                reply = None
                raise RequestIdTaken(_TAKEN)
            return reply
        finally:
            del self._running[key]
            running.reply.set_result(reply)

    async def _wait_for(self, running: _Running) -> Interaction | None:
        if running.waiting >= self._limits.max_waiting_repeats:
            raise Overloaded(
                f"{running.waiting} calls wait for the reply to this request already",
                retry_after_s=self._limits.retry_after_s,
            )
        running.waiting += 1
        try:
            return await asyncio.shield(running.reply)
        finally:
            running.waiting -= 1

    async def _look_up(self, user: User, request_id: str) -> Interaction | None:
        if self._is_at_hand:
            return self._find(user, request_id)
        return await asyncio.to_thread(self._find, user, request_id)

    def _find(self, user: User, request_id: str) -> Interaction | None:
        with reading(self._database) as connection:
            return interactions.find(connection, user, request_id)
