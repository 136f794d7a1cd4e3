"""A pool of candidates, sampled and scored in one wave or two: the driver of all strategies that draw
from a distribution over the whole of it."""

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from server.concurrency import end_all, under_way
from server.guidance.fallback import most_likely
from server.guidance.outcome import (
    Choice,
    Enough,
    NotScored,
    Outcome,
    Worker,
    draw_arm,
    marginal_propensities,
    settle,
)
from thumbloop.types import Arm, Candidate, Extent

Weights = Callable[[Sequence[float], float], list[float]]
"""(rewards (N,), temperature) -> the strategy's probability of showing each, (N,)."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Candidates in the order of their index; `problem` says why some have no reward, or is empty."""

    candidates: tuple[Candidate, ...]
    extent: Extent
    problem: str = ""

    @property
    def is_cut(self) -> bool:
        """Say whether candidates are missing because they took too long."""
        return self.extent is Extent.DEADLINE

    @property
    def rewards(self) -> list[float]:
        """Return every candidate's reward, (N,); only where there is no problem."""
        return [c.reward for c in self.candidates if c.reward is not None]


async def run_pooled(worker: Worker, choice: Choice, rng: Random, weights_of: Weights) -> Outcome:
    """Fill a pool and show one of it: drawn by weight, or uniformly for an audit."""
    arm = draw_arm(choice.audit_share, rng)
    pool = await fill(worker, choice, arm)
    if pool.problem:
        selected = "cut" if pool.is_cut else ""
        return most_likely(pool.candidates, pool.problem, extent=pool.extent, selected=selected)
    n = len(pool.candidates)
    if not worker.can_score:
        return settle(pool.candidates, rng.randrange(n), [1 / n] * n, arm=arm, reranked=False)
    weights = weights_of(pool.rewards[: pool_size(pool.rewards, choice)], choice.temperature)
    weights += [0.0] * (n - len(weights))
    return settle(
        pool.candidates,
        draw(weights, arm, rng),
        marginal_propensities(weights, choice.audit_share, choice.num_candidates),
        arm=arm,
        reranked=True,
        extent=pool.extent,
    )


def draw(weights: Sequence[float], arm: Arm, rng: Random) -> int:
    """Return the shown candidate's index: by weight, or uniformly for an audit."""
    if arm is Arm.AUDIT:
        return rng.randrange(len(weights))
    return rng.choices(range(len(weights)), weights=weights)[0]


def is_enough(rewards: Sequence[float], enough: Enough | None) -> bool:
    """Say whether a first wave of rewards (N,) makes a second one unnecessary."""
    if enough is None:
        return False
    return max(rewards) >= enough.best and statistics.pstdev(rewards) <= enough.spread


def pool_size(rewards: Sequence[float], choice: Choice) -> int:
    """Return how many of the candidates the strategy itself would have stopped at.

    `rewards` are those known: the first wave's, or all of them.
    """
    first = choice.first_wave
    if 0 < first < choice.num_candidates and is_enough(rewards[:first], choice.enough):
        return first
    return choice.num_candidates


async def fill(worker: Worker, choice: Choice, arm: Arm) -> Pool:
    """Sample and score candidates, each scored as it finishes; an audit always samples all.

    When the time limit is near, those that are ready are all there is; at least one is waited for.
    """
    loop = asyncio.get_running_loop()
    end = None if choice.time_limit_s is None else loop.time() + choice.time_limit_s
    first = choice.first_wave
    if choice.num_candidates == 1:
        worker.show(0)
    if arm is Arm.AUDIT or not worker.can_score or not 0 < first < choice.num_candidates:
        return await _wave(worker, range(choice.num_candidates), end)
    pool = await _wave(worker, range(first), end)
    if pool.problem:
        return pool if pool.is_cut else replace(pool, extent=Extent.UNSCORED)
    if pool_size(pool.rewards, choice) == first:
        return replace(pool, extent=Extent.ENOUGH)
    rest = await _wave(worker, range(first, choice.num_candidates), end, is_first=False)
    return Pool(pool.candidates + rest.candidates, rest.extent, rest.problem)


async def _wave(
    worker: Worker, indices: range, end: float | None, *, is_first: bool = True
) -> Pool:
    """Fill one wave until all are done, or the loop's clock says `end`.

    A first wave waits for one candidate at least; a second one is not begun too late.
    """
    if not is_first and end is not None and asyncio.get_running_loop().time() >= end:
        return Pool((), Extent.DEADLINE, "deadline")
    ready: dict[int, Candidate] = {}
    one_is_ready = asyncio.Event()
    problems: list[str] = []

    async def candidate(index: int) -> None:
        ready[index] = await worker.sample(index, is_urgent=is_first)
        one_is_ready.set()
        if worker.can_score:
            try:
                ready[index] = await worker.score(ready[index], is_urgent=is_first)
            except NotScored as error:
                problems.append(error.reason)

    tasks = [asyncio.ensure_future(candidate(index)) for index in indices]
    try:
        is_late = not await _all_done(tasks, end)
        if is_late and is_first and not ready:
            async with under_way(one_is_ready.wait()) as one:
                await asyncio.wait((one, *tasks), return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end_all(tasks)
    _raise_failed(tasks)
    candidates = tuple(ready[i] for i in sorted(ready))
    if is_late:
        return Pool(candidates, Extent.DEADLINE, "deadline")
    return Pool(candidates, Extent.REQUESTED, problems[0] if problems else "")


async def _all_done(tasks: Sequence["asyncio.Future[None]"], end: float | None) -> bool:
    """Wait for all, for the first failure, or for the end; say whether nothing is left to wait for."""
    left = None if end is None else max(end - asyncio.get_running_loop().time(), 0.0)
    done, pending = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
    return not pending or any(not task.cancelled() and task.exception() for task in done)


def _raise_failed(tasks: Sequence["asyncio.Future[None]"]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()):
            raise error
