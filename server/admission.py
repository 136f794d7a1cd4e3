"""How much may be under way at once, and who waits: a bounded queue, and quotas before it."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from thumbloop.config.server import Limits, Quotas
from thumbloop.errors import InvalidRequest, Overloaded
from thumbloop.types import User


class Cost(NamedTuple):
    """What a call may take: candidates sampled at once, and tokens, its prompt's and all of theirs."""

    candidates: int
    tokens: int


class _Waiting(NamedTuple):
    cost: Cost
    turn: asyncio.Event


class Admission:
    """Lets calls in, in the order they came, while candidates and tokens in flight are within limits.

    A call of n candidates counts n, in flight and in the queue. Those that nobody waits for come after
    all others. Lives on the event loop.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.candidates = 0
        self.tokens = 0
        self.queued = 0
        self._interactive: deque[_Waiting] = deque()
        self._background: deque[_Waiting] = deque()

    def check(self, cost: Cost, *, is_background: bool = False) -> None:
        """Raise Overloaded where such a call would have to wait and the queue is full. InvalidRequest: it
        would never get a turn."""
        if cost.tokens > self._limits.max_tokens_in_flight:
            raise InvalidRequest.of(
                "prompt",
                f"with all candidates this may take {cost.tokens} tokens,"
                f" more than the {self._limits.max_tokens_in_flight} that may be in flight",
            )
        is_full = self.queued + cost.candidates > self._limits.max_queued_candidates
        if is_full and not self._is_free(cost, is_background):
            raise Overloaded(
                f"{self.candidates} candidates are in flight and {self.queued} wait; try again",
                retry_after_s=self._limits.retry_after_s,
            )

    @asynccontextmanager
    async def enter(self, cost: Cost, *, is_background: bool = False) -> AsyncIterator[None]:
        """Wait for the call's turn, and count it until it leaves.

        Raises Overloaded: the queue is full. InvalidRequest: it would never get a turn.
        """
        self.check(cost, is_background=is_background)
        if self._is_free(cost, is_background):
            self._take(cost)
        else:
            await self._wait(cost, self._background if is_background else self._interactive)
        try:
            yield
        finally:
            self._give_back(cost)

    async def _wait(self, cost: Cost, queue: deque[_Waiting]) -> None:
        waiting = _Waiting(cost, asyncio.Event())
        queue.append(waiting)
        self.queued += cost.candidates
        try:
            await waiting.turn.wait()
        except asyncio.CancelledError:
            if waiting.turn.is_set():
                self._give_back(cost)  # its turn came while it was leaving
            else:
                queue.remove(waiting)
                self.queued -= cost.candidates
                self._next()
            raise

    def _is_free(self, cost: Cost, is_background: bool) -> bool:
        goes_first = not self._interactive and not (is_background and self._background)
        return goes_first and self._has_room(cost)

    def _has_room(self, cost: Cost) -> bool:
        return (
            self.candidates + cost.candidates <= self._limits.max_candidates_in_flight
            and self.tokens + cost.tokens <= self._limits.max_tokens_in_flight
        )

    def _take(self, cost: Cost) -> None:
        self.candidates += cost.candidates
        self.tokens += cost.tokens

    def _give_back(self, cost: Cost) -> None:
        self.candidates -= cost.candidates
        self.tokens -= cost.tokens
        self._next()

    def _next(self) -> None:
        """Let in whose turn it is; the first in the queue is never overtaken."""
        while (queue := self._interactive or self._background) and self._has_room(queue[0].cost):
            cost, turn = queue.popleft()
            self.queued -= cost.candidates
            self._take(cost)
            turn.set()


class Quota:
    """How many candidates each user, and each token, may ask for in a time."""

    def __init__(self, settings: Quotas) -> None:
        self._per_user = parse(settings.per_user) if settings.per_user else None
        self._per_token = parse(settings.per_token) if settings.per_token else None
        self._windows = SlidingWindowCounterRateLimiter(MemoryStorage())

    def check(self, user: User, candidates: int) -> None:
        """Raise Overloaded, which says when to come back, where a quota is used up. InvalidRequest: such a
        call would never be in time."""
        for quota, whose, name in self._of(user):
            self._check(quota, whose, name, candidates)

    def use(self, user: User, candidates: int) -> None:
        """Count a call. Raises what `check` raises, and has counted nothing then."""
        self.check(user, candidates)
        for quota, whose, name in self._of(user):
            self._windows.hit(quota, whose, name, cost=candidates)

    def _of(self, user: User) -> list[tuple[RateLimitItem, str, str]]:
        quotas = (
            (self._per_user, "user", repr((user.subject, user.user_id))),
            (self._per_token, "token", user.subject),
        )
        return [(quota, whose, name) for quota, whose, name in quotas if quota is not None]

    def _check(self, quota: RateLimitItem, whose: str, name: str, cost: int) -> None:
        if self._windows.test(quota, whose, name, cost=cost):
            return
        words = f"quota of {quota.amount} candidates in {quota.get_expiry()} s"
        if cost > quota.amount:
            raise InvalidRequest.of("guidance.num_candidates", f"is above the {whose}'s {words}")
        reset = self._windows.get_window_stats(quota, whose, name).reset_time
        raise Overloaded(
            f"this {whose} has used its {words}", retry_after_s=max(reset - time.time(), 0.1)
        )
