import asyncio

import pytest

from server.concurrency import gather_or_cancel


class Sleeper:
    """Sleeps until cancelled, and takes its time to wake."""

    def __init__(self) -> None:
        self.is_asleep = asyncio.Event()
        self.is_cleaned_up = False

    async def sleep(self) -> int:
        self.is_asleep.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            self.is_cleaned_up = True
        return 0


async def test_results_come_in_order():
    async def after(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    assert await gather_or_cancel(after(s) for s in (0.02, 0.0, 0.01)) == [0.02, 0.0, 0.01]


async def test_one_failure_cancels_the_others_before_it_is_raised():
    sleeper = Sleeper()

    async def fail() -> int:
        await sleeper.is_asleep.wait()
        raise ValueError("one of two")

    with pytest.raises(ValueError, match="one of two"):
        await gather_or_cancel([sleeper.sleep(), fail()])
    assert sleeper.is_cleaned_up


async def test_a_caller_that_gives_up_leaves_nobody_behind():
    sleepers = [Sleeper(), Sleeper()]
    task = asyncio.create_task(gather_or_cancel(s.sleep() for s in sleepers))
    for sleeper in sleepers:
        await sleeper.is_asleep.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(s.is_cleaned_up for s in sleepers)


async def test_two_failures_at_once_are_one_failure():
    async def fail(word: str) -> int:
        raise ValueError(word)

    with pytest.raises(ValueError, match="first"):
        await gather_or_cancel([fail("first"), fail("second")])
