"""What is asked, and when: so many calls at a time, or arrivals at moments that no answer delays."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from time import perf_counter

import grpc

from thumbloop.errors import ThumbloopError


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call brought. Rewards are logits, of the reply and of all its candidates."""

    reply_tokens: int
    decoded_tokens: int
    policy_version: int | None = None
    reward: float | None = None
    candidate_rewards: tuple[float, ...] = ()
    num_candidates: int = 1
    reranked: bool = True
    """False: rewards had no say, as scoring failed."""


Ask = Callable[[int], Awaitable[Answer]]
"""Asks the question of this number."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a closed loop did: answers and latencies in the order of the questions that got one."""

    seconds: float
    answers: tuple[Answer, ...]
    latencies_s: tuple[float, ...]
    failed: int

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second."""
        return sum(answer.decoded_tokens for answer in self.answers) / self.seconds

    @property
    def requests_per_s(self) -> float:
        """Answers per second."""
        return len(self.answers) / self.seconds


async def closed_loop(ask: Ask, numbers: Sequence[int], at_once: int) -> Throughput:
    """Ask the questions of these numbers, always `at_once` of them under way.

    A call that a gRPC server refuses is counted; whatever else goes wrong raises.
    """
    waiting = iter(numbers)
    done: dict[int, tuple[Answer, float]] = {}

    async def caller() -> None:
        for number in waiting:
            started = perf_counter()
            with suppress(ThumbloopError, grpc.aio.AioRpcError):
                answer = await ask(number)
                done[number] = (answer, perf_counter() - started)

    started = perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    seconds = perf_counter() - started
    answered = [done[number] for number in numbers if number in done]
    return Throughput(
        seconds=seconds,
        answers=tuple(answer for answer, _ in answered),
        latencies_s=tuple(latency_s for _, latency_s in answered),
        failed=len(numbers) - len(answered),
    )


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an open loop. `due_s` and the rest count from the loop's start.

    Latency counts from when the call was due, not from when it was sent: a generator that falls
    behind must not hide what users would have waited (coordinated omission).
    """

    kind: str
    due_s: float
    sent_s: float
    done_s: float
    status: str
    answer: Answer | None

    @property
    def latency_s(self) -> float:
        """Seconds from the moment the call was due."""
        return self.done_s - self.due_s


def arrivals(rate: float, duration_s: float, rng: Random) -> Iterator[float]:
    """Yield the moments of a Poisson process, seconds: independent users at `rate` per second."""
    moments = itertools.accumulate(iter(lambda: rng.expovariate(rate), None))
    return itertools.takewhile(lambda moment: moment < duration_s, moments)


def mixture(shares: Mapping[str, float], rng: Random) -> Iterator[str]:
    """Yield kinds at random, each with its share."""
    kinds, weights = list(shares), list(shares.values())
    while True:
        yield rng.choices(kinds, weights)[0]


async def open_loop(
    asks: Mapping[str, Ask], moments: Iterable[float], kinds: Iterable[str]
) -> list[Call]:
    """Send a call at each moment, however many are still under way; failures are part of the result."""
    started = perf_counter()
    calls: list[Call] = []

    async def send(number: int, kind: str, due_s: float) -> None:
        sent_s = perf_counter() - started
        answer, status = None, "OK"
        try:
            answer = await asks[kind](number)
        except ThumbloopError as error:
            status = error.code.name
        calls.append(Call(kind, due_s, sent_s, perf_counter() - started, status, answer))

    async with asyncio.TaskGroup() as tasks:
        for number, (due_s, kind) in enumerate(zip(moments, kinds, strict=False)):
            await asyncio.sleep(max(0.0, started + due_s - perf_counter()))
            tasks.create_task(send(number, kind, due_s))
    return sorted(calls, key=lambda call: call.due_s)
