"""The other callers, while one misbehaves: ten modest ones at a steady pace, and how long they wait.

The engine takes so long over each of their calls that what else a busy machine does is small beside
it, while a server that makes them wait for somebody else shows at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from statistics import median
from typing import Any

from loadtest.workload import Answer, Call, open_loop
from server.engine import Sampled
from tests.fakes import FakeEngine
from tests.serving import Running
from thumbloop.types import Sampling

ENGINE_S = 0.15
MODEST = [f"modest{number}" for number in range(10)]


class UnhurriedEngine(FakeEngine):
    """A fake engine that takes its time over each reply, however many there are at once."""

    async def sample(
        self, prompt: Sequence[int], sampling: Sampling, *rest: Any, **more: Any
    ) -> Sampled:
        """Sample one response; see Engine."""
        await asyncio.sleep(ENGINE_S)
        return await super().sample(prompt, sampling, *rest, **more)


async def calls(
    server: Running, users: Sequence[str], *, per_s: float, duration_s: float
) -> list[Call]:
    """Let these users ask in turn, at a steady pace that no answer delays."""

    async def ask(number: int) -> Answer:
        reply = await server.client.generate("hello", user_id=users[number % len(users)])
        return Answer(reply.usage.reply_tokens, reply.usage.candidate_tokens)

    count = int(per_s * duration_s)
    return await open_loop({"": ask}, (i / per_s for i in range(count)), [""] * count)


def success(calls: Sequence[Call]) -> float:
    """Return the share of calls that were answered."""
    return sum(call.status == "OK" for call in calls) / len(calls)


def typical_s(calls: Sequence[Call]) -> float:
    """Return the median of what answers took, seconds: the slowest wait for whatever else the machine does."""
    return median(call.latency_s for call in calls if call.status == "OK")


async def least_of(cost: Callable[[], Awaitable[float]], *, enough: float) -> float:
    """Return the least of up to three costs: what the machine does in between comes and goes, what a server does stays."""
    least = await cost()
    for _ in range(2):
        if least <= enough:
            break
        least = min(least, await cost())
    return least
