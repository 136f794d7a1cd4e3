"""What callers may see of an error: ours as it is, of any other that it happened."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from thumbloop.errors import ThumbloopError

log = logging.getLogger(__name__)

_PATIENCE_S = 1.0  # with a reader that takes nothing, not even that its call has failed
UNEXPECTED = "internal error; the server's log has the cause"


def shown(error: Exception, what: str) -> ThumbloopError:
    """Return the error as callers see it; the cause of one that is not ours goes to the log."""
    if isinstance(error, ThumbloopError):
        return error
    log.error("%s failed", what, exc_info=error)
    return ThumbloopError(UNEXPECTED)


@asynccontextmanager
async def patience() -> AsyncIterator[None]:
    """Leave the block, without an error, when whoever should hear how a call ended takes too long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE_S):
            yield
