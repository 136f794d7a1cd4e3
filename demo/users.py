"""Simulated users: they ask about films, food, books and services, and some of them give thumbs.

Their taste is a hidden function of the reply; a tenth of their thumbs are slips. They talk to the
server over gRPC like anybody else, at a bounded rate.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from demo.ledger import Ledger, Served
from demo.preferences import Preference
from demo.speaker import Speaker
from thumbloop.errors import ThumbloopError


@dataclass(frozen=True, slots=True)
class Crowd:
    """Who the users are and how they behave; rates are per second over all users."""

    users: int = 60
    requests_per_s: float = 2.5
    rating_share: float = 0.6
    noise: float = 0.1
    shuffle_block: int = 16
    """Thumbs permuted together in the control."""


def moved(thumbs: Sequence[bool]) -> list[bool]:
    """Permute thumbs for the control so that no reply keeps its own, which a shuffle would let one in N do."""
    half = len(thumbs) // 2
    return [*thumbs[half:], *thumbs[:half]]


class Users:
    """Sends requests and thumbs until cancelled."""

    def __init__(
        self,
        client: Speaker,
        prompts: list[str],
        preference: Preference,
        crowd: Crowd,
        ledger: Ledger,
        *,
        seed: int,
        shuffled: bool,
    ) -> None:
        self._client = client
        self._prompts = prompts
        self._preference = preference
        self._crowd = crowd
        self._ledger = ledger
        self._rng = Random(seed)
        self._shuffled = shuffled
        self._unsent: list[tuple[str, str, bool]] = []  # user, response, up: the control's block
        self._visits: set[asyncio.Task[None]] = set()
        self._broken: BaseException | None = None

    async def visit(self) -> None:
        """Let users come at random, independent moments; a slow server does not slow them down."""
        for prompt in itertools.cycle(self._prompts):
            await asyncio.sleep(self._rng.expovariate(self._crowd.requests_per_s))
            user = f"user-{self._rng.randrange(self._crowd.users):03d}"
            visit = asyncio.create_task(self._ask_and_rate(user, prompt))
            self._visits.add(visit)
            visit.add_done_callback(self._left)
            if self._broken is not None:
                raise self._broken

    def _left(self, visit: asyncio.Task[None]) -> None:
        """Keep what broke a visit, such as a preference that raises."""
        self._visits.discard(visit)
        if not visit.cancelled():
            error = visit.exception()  # always asked for, or asyncio complains of it much later
            self._broken = self._broken or error

    async def leave(self) -> None:
        """Wait for the visits that are under way."""
        if self._visits:
            await asyncio.wait(self._visits)

    async def _ask_and_rate(self, user: str, prompt: str) -> None:
        rates = self._rng.random() < self._crowd.rating_share
        slips = self._rng.random() < self._crowd.noise
        mood = self._rng.random()
        try:
            reply = await self._client.generate(prompt, user_id=user)
        except ThumbloopError as error:
            self._ledger.fail(error)
            return
        liked = self._preference(prompt, reply.text)
        self._ledger.served.append(
            Served(reply.response_id, reply.policy_version, time.time(), liked)
        )
        if rates:
            await self._give(user, reply.response_id, (mood < liked) != slips)

    async def _give(self, user: str, response_id: str, up: bool) -> None:
        """Send a thumb; in the control, hold a block back and permute it among its replies."""
        if not self._shuffled:
            await self._send(user, response_id, up)
            return
        self._unsent.append((user, response_id, up))
        if len(self._unsent) >= self._crowd.shuffle_block:
            block, self._unsent = self._unsent, []
            thumbs = moved([up for _, _, up in block])
            for (who, reply, _), thumb in zip(block, thumbs, strict=True):
                await self._send(who, reply, thumb)

    async def _send(self, user: str, response_id: str, up: bool) -> None:
        self._ledger.sent += 1
        try:
            await self._client.rate(response_id, up=up, user_id=user, request_id=response_id)
        except ThumbloopError as error:
            words = f"{error.code.name}: {error}"
            self._ledger.failed_thumbs.append((time.time(), words))
            return
        self._ledger.acknowledged[response_id] = (time.time(), int(up))
