"""Questions to the store, asked in a thread: the event loop answers people meanwhile."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from thumbloop.store import reading

T = TypeVar("T")


async def ask(database: Database, query: Callable[[Connection], T]) -> T:
    """Return what a query finds. Raises StoreUnavailable."""

    def read() -> T:
        with reading(database) as connection:
            return query(connection)

    return await asyncio.to_thread(read)
