"""What callers may see of an error: ours as it is, of any other that it happened."""

import logging

from thumbloop.errors import ThumbloopError

log = logging.getLogger(__name__)

UNEXPECTED = "internal error; the server's log has the cause"


def shown(error: Exception, what: str) -> ThumbloopError:
    """Return the error as callers see it; the cause of one that is not ours goes to the log."""
    if isinstance(error, ThumbloopError):
        return error
    log.error("%s failed", what, exc_info=error)
    return ThumbloopError(UNEXPECTED)
