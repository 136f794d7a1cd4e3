"""One thread that writes: many callers' changes share one commit, and no event loop waits for disk."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from thumbloop.errors import StoreUnavailable
from thumbloop.store.database import is_unavailable

T = TypeVar("T")


class _Write(NamedTuple):
    """A change for a connection, or what needs the database to itself."""

    change: Callable[[Any], Any]
    result: Future[Any]
    is_alone: bool = False


class _Outcome(NamedTuple):
    value: Any
    error: BaseException | None


class GroupWriter:
    """Runs changes in order, as many in one transaction as have arrived; each undone alone if it fails.

    A result is delivered only after the commit that holds it. `on_commit` hears of each commit:
    how many changes it held, and how long it took in seconds; `on_error` of each that the database
    did not take.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_group: int = 256,
        on_commit: Callable[[int, float], None] = lambda _changes, _seconds: None,
        on_error: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._max_group = max_group
        self._on_commit = on_commit
        self._on_error = on_error
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._next: _Write | None = None  # taken out of the queue, and not in the last group
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return how many changes wait for a commit."""
        return self._queue.qsize()

    def submit(self, change: Callable[[Connection], T]) -> "Future[T]":
        """Queue a change; the future holds what it returns once it is durable.

        The future raises what the change raises, or StoreUnavailable when the commit fails.
        """
        return self._put(change, is_alone=False)

    async def run_alone(self, job: Callable[[Engine], T]) -> T:
        """Await what is done between two commits; it opens connections itself, and changes wait for its end."""
        return await asyncio.shield(asyncio.wrap_future(self._put(job, is_alone=True)))

    def _put(self, change: Callable[[Any], T], *, is_alone: bool) -> "Future[T]":
        if self._is_closed:
            raise StoreUnavailable("the store is closed")
        result: Future[T] = Future()
        self._queue.put(_Write(change, result, is_alone))
        return result

    def start(self, change: Callable[[Connection], T]) -> "asyncio.Future[T]":
        """Queue a change; await what it returns, or don't: cancelling the waiter does not undo it."""
        return asyncio.shield(asyncio.wrap_future(self.submit(change)))

    async def run(self, change: Callable[[Connection], T]) -> T:
        """Await a change."""
        return await self.start(change)

    def close(self) -> None:
        """Commit what is queued, then stop."""
        self._is_closed = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while group := self._next_group():
            self._commit(group)

    def _next_group(self) -> list[_Write]:
        """Wait for a write and take those that have queued behind it; empty when closed."""
        first, self._next = self._next or self._queue.get(), None
        group: list[_Write] = []
        while first is not None:
            if first.is_alone and group:
                self._next = first
                return group
            group.append(first)
            if first.is_alone or len(group) == self._max_group or self._queue.empty():
                return group
            first = self._queue.get()
        self._queue.put(None)  # come back to it after this group
        return group

    def _commit(self, group: list[_Write]) -> None:
        started = time.perf_counter()
        try:
            outcomes = self._apply(group)
        except SQLAlchemyError as error:
            self._on_error()
            cause = getattr(error, "orig", None) or error
            failure = StoreUnavailable(f"the store did not take the write: {cause}")
            outcomes = [_Outcome(None, failure)] * len(group)
        if not group[0].is_alone:
            self._on_commit(len(group), time.perf_counter() - started)
        for write, outcome in zip(group, outcomes, strict=True):
            if not write.result.set_running_or_notify_cancel():
                continue  # nobody waits for it any more
            if outcome.error is None:
                write.result.set_result(outcome.value)
            else:
                write.result.set_exception(outcome.error)

    def _apply(self, group: list[_Write]) -> list[_Outcome]:
        """Commit all changes but those that fail, whose failure costs the others nothing."""
        if group[0].is_alone:
            return [_attempt(partial(nullcontext, self._engine), group[0].change)]
        if len(group) == 1:  # the transaction itself is its savepoint
            return [_attempt(self._engine.begin, group[0].change)]
        with self._engine.begin() as connection:
            return [_attempt(partial(_savepoint, connection), write.change) for write in group]


@contextmanager
def _savepoint(connection: Connection) -> Iterator[Connection]:
    with connection.begin_nested():
        yield connection


class _ChangeFailed(Exception):
    """Carries a change's own failure out of its transaction; the store's failures stay what they are."""


def _attempt(
    begin: Callable[[], AbstractContextManager[Any]], change: Callable[[Any], Any]
) -> _Outcome:
    """Run one change in a transaction or savepoint of its own, which its failure undoes.

    Raises SQLAlchemyError: the store failed, and with it the whole group.
    """
    try:
        with begin() as connection:
            try:
                value = change(connection)
            except Exception as error:
                if isinstance(error, DBAPIError) and is_unavailable(error):
                    raise  # locked or full: SQLite may have rolled all of it back
                raise _ChangeFailed from error
    except _ChangeFailed as failed:
        return _Outcome(None, failed.__cause__)
    return _Outcome(value, None)
