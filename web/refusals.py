"""What a page says, in plain words, where a call came to nothing."""

import math

from thumbloop.errors import (
    DeadlineExceeded,
    FeedbackTooLate,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    ThumbloopError,
    Unauthenticated,
    Unavailable,
)

_WORDS: dict[type[ThumbloopError], str] = {
    Unavailable: "The server does not answer now. Try again in a moment.",
    DeadlineExceeded: "The server took too long. Try again.",
    Unauthenticated: "The server does not know this page. Its token has to be set: see docs/web.md.",
    PermissionDenied: "This page may not do that: its token lacks a scope. See docs/web.md.",
    NotFound: "The server does not know this reply, or it was given to somebody else.",
    FeedbackTooLate: "This reply is too old to be rated.",
}


def in_words(error: ThumbloopError) -> str:
    """Return what went wrong and what to do, for somebody who knows nothing of calls."""
    if isinstance(error, Overloaded):
        return f"The server is busy. Try again in {_seconds(error.retry_after_s)}."
    if isinstance(error, InvalidRequest):
        return f"The server cannot answer this: {error}. Shorten or change it, or begin anew."
    for kind, words in _WORDS.items():
        if isinstance(error, kind):
            return words
    return f"Something went wrong ({error.code.name}). Try again; the server's log has the cause."


def _seconds(delay_s: float) -> str:
    seconds = max(1, math.ceil(delay_s))
    return "a second" if seconds == 1 else f"{seconds} seconds"
