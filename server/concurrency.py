"""Waiting for many at once without leaving any behind, and for no longer than is good."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from thumbloop.errors import DeadlineExceeded

T = TypeVar("T")


@asynccontextmanager
async def under_way(coroutine: Coroutine[Any, Any, T]) -> "AsyncIterator[asyncio.Task[T]]":
    """Run a task beside the block; when the block is left the task is cancelled and has ended."""
    task = asyncio.ensure_future(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all; when one fails or the caller is cancelled, cancel the rest and wait for their end."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await end_all(tasks)
        raise


async def end_all(tasks: "Sequence[asyncio.Future[Any]]") -> None:
    """Cancel what has not ended, and wait until all have; what they raise is passed over."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def within(limit_s: float | None, otherwise: str) -> AsyncIterator[None]:
    """Give the block so many seconds; None: any. Raises DeadlineExceeded, which says what was not so."""
    try:
        async with asyncio.timeout(limit_s) as scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise DeadlineExceeded(f"{otherwise} within {limit_s:.3g} s") from None
