"""Versions on trial: servers on one store, and people who use them and say what they like."""

import random
import time
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import Engine as Database

from server.canary import unit_of
from server.verification import Expected
from tests.fakes import FakeEngine
from tests.rows import interaction
from tests.swapping import Server
from thumbloop.config import State
from thumbloop.config.delivery import Canary, Delivery
from thumbloop.store import GroupWriter, deployments, feedback, interactions, reading
from thumbloop.types import DEFAULT_POLICY, Status, User

TRIALS = Delivery(
    mode="canary",
    poll_interval_s=0.01,
    drain_timeout_s=0.05,
    canary=Canary(share=0.3, horizon=200, look_interval_s=0.01),
)
PEOPLE = [User("", f"user {n}") for n in range(600)]


class World:
    """Servers on one store, and people who use them."""

    def __init__(
        self,
        tiny_model: Any,
        database: Database,
        writer: GroupWriter,
        state: State,
        expected: Expected,
    ) -> None:
        self._parts = (database, writer, state, expected)
        self._model = tiny_model
        self.database = database

    def server(self, settings: Delivery = TRIALS, **options: Any) -> Server:
        """Return a server with an engine of its own."""
        return Server(FakeEngine(self._model), *self._parts, settings=settings, **options)

    def rate(
        self,
        server: Server,
        people: Iterable[User],
        likes: Callable[[User, int], float],
        *,
        pinned: int | None = None,
        **changes: Any,
    ) -> None:
        """Let each get a reply from where it is routed, and like it with this probability."""
        rng = random.Random(0)
        with self.database.begin() as connection:
            for user in people:
                with server.routes.hold(pinned, unit_of(user, "")) as version:
                    number = version.number
                values = {
                    "policy_version": number,
                    "user": user,
                    "created_at": time.time() + changes.get("duration_s", 0.0),
                    "duration_s": 0.0,
                    "pinned": pinned is not None,
                    **changes,
                }
                reply = interaction(**values)
                interactions.append(connection, reply)
                if reply.status is Status.COMPLETED:
                    up = int(rng.random() < likes(user, number))
                    feedback.submit_thumb(connection, reply.response_id, up, user, at=time.time())

    def events(self) -> list[Any]:
        with reading(self.database) as connection:
            return deployments.list_events(connection, DEFAULT_POLICY)


def has_it(server: Server, people: Iterable[User] = PEOPLE) -> list[User]:
    """Return who is answered by the canary."""
    found = []
    for user in people:
        with server.routes.hold(unit=unit_of(user, "")) as version:
            if version.number == server.routes.routed.canary:
                found.append(user)
    return found
