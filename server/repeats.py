"""Retries: a request id names one request of its user, and all who send it get the same reply."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable

from sqlalchemy import Engine as Database

from thumbloop.errors import RequestIdTaken
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


class Repeats:
    """Answers each request id of a user once: what is stored is returned, what runs is waited for.

    One that failed or was given up left nothing, and its retry is answered anew.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        # A look into SQLite's index takes a tenth of what handing it to another thread does.
        self._is_at_hand = database.dialect.name == "sqlite"
        self._running: dict[tuple[User, str], tuple[str, asyncio.Event]] = {}

    async def once(
        self,
        user: User,
        request_id: str,
        digest: str,
        answer: Callable[[], Awaitable[Interaction]],
    ) -> Interaction:
        """Return the reply to this request, made by `answer` unless there is one.

        Raises RequestIdTaken: the id is another request's; and what `answer` raises.
        """
        key = (user, request_id)
        while key in self._running:
            theirs, has_ended = self._running[key]
            if theirs != digest:
                raise RequestIdTaken(_TAKEN)
            await has_ended.wait()
        has_ended = asyncio.Event()
        self._running[key] = (digest, has_ended)
        try:
            stored = await self._look_up(user, request_id)
            if stored is None:
                return await answer()
            if stored.request_digest != digest:
                raise RequestIdTaken(_TAKEN)
            return stored
        finally:
            del self._running[key]
            has_ended.set()

    async def _look_up(self, user: User, request_id: str) -> Interaction | None:
        if self._is_at_hand:
            return self._find(user, request_id)
        return await asyncio.to_thread(self._find, user, request_id)

    def _find(self, user: User, request_id: str) -> Interaction | None:
        with reading(self._database) as connection:
            return interactions.find(connection, user, request_id)
