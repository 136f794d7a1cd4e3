"""Every error that callers, operators or the log may see, each with its gRPC status.

ThumbloopError                  INTERNAL             something of ours went wrong
├── InvalidRequest              INVALID_ARGUMENT     the caller has to change the request
├── NotFound                    NOT_FOUND            no such thing, or not for this caller
│   ├── UnknownPolicy
│   ├── UnknownPolicyVersion
│   └── UnknownResponse
├── Unauthenticated             UNAUTHENTICATED      no token, or none that is known
├── PermissionDenied            PERMISSION_DENIED    the token is not for this
├── RequestIdTaken              ALREADY_EXISTS       the request id was used for another request
├── DeadlineExceeded            DEADLINE_EXCEEDED    no answer within the time that was given
├── PolicyVersionUnavailable    FAILED_PRECONDITION  the version exists but is not loaded
├── FeedbackTooLate             FAILED_PRECONDITION  the reply is too old to be rated
├── VersionConflict             ABORTED              a compare-and-set lost
├── CorruptedReply              INTERNAL             the engine's numbers are none
├── Overloaded                  RESOURCE_EXHAUSTED   try again later
│   └── ReaderTooSlow                                a stream that nobody reads
├── Unavailable                 UNAVAILABLE          draining or restarting
│   ├── Draining
│   ├── EngineUnavailable
│   ├── ScorerUnavailable
│   └── StoreUnavailable
├── BadPolicyVersion            FAILED_PRECONDITION  a published version failed a check
├── BadDataFile                 FAILED_PRECONDITION  a file of data cannot be read or written as asked
├── StoreIncompatible           FAILED_PRECONDITION  the store is from a newer release
└── SettingsError               FAILED_PRECONDITION  the configuration cannot work
"""

from collections.abc import Iterator
from dataclasses import dataclass

import grpc

MOST_NAMED = 16
"""Violations that a refusal names."""
MOST_BYTES = 1200
"""What a refusal says, as UTF-8: a status travels in headers three times, and gRPC drops long ones."""
_MOST_OF_FIELD, _MOST_OF_DESCRIPTION = 128, 768


class ThumbloopError(Exception):
    """Base of all errors of this project."""

    code = grpc.StatusCode.INTERNAL


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong: its path and what is expected."""

    field: str
    description: str


class InvalidRequest(ThumbloopError):
    """The request breaks the contract; `violations` name the fields, as many as a status has room for."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, *violations: FieldViolation) -> None:
        self.violations = tuple(_with_room(violations))
        words = [f"{v.field}: {v.description}" for v in self.violations]
        if len(violations) > len(words):
            words.append(f"and {len(violations) - len(words)} more")
        super().__init__("; ".join(words))

    @classmethod
    def of(cls, field: str, description: str) -> "InvalidRequest":
        """Return the error for one field."""
        return cls(FieldViolation(field, description))


def _with_room(violations: tuple[FieldViolation, ...]) -> Iterator[FieldViolation]:
    """Yield the first violations, clipped, until there is no room for another."""
    room = MOST_BYTES
    for violation in violations[:MOST_NAMED]:
        field = clipped(violation.field, _MOST_OF_FIELD)
        description = clipped(violation.description, _MOST_OF_DESCRIPTION)
        room -= len(f"{field}: {description}; ".encode())
        if room < 0:
            break
        yield FieldViolation(field, description)


def clipped(text: str, most_bytes: int) -> str:
    """Return what fits into so many bytes of UTF-8; a text that was longer ends with "..."."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= most_bytes:
        return text
    return encoded[: most_bytes - 3].decode(errors="ignore") + "..."


class NotFound(ThumbloopError):
    """What was asked for does not exist, or not for this caller."""

    code = grpc.StatusCode.NOT_FOUND


class UnknownPolicy(NotFound):
    """No policy of this name is served."""


class UnknownPolicyVersion(NotFound):
    """The policy has no such version."""


class UnknownResponse(NotFound):
    """No such reply, or it belongs to somebody else; the words are the same."""


class Unauthenticated(ThumbloopError):
    """The call carries no bearer token, or one that this server does not know."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ThumbloopError):
    """The call's token has not the scope that this call needs."""

    code = grpc.StatusCode.PERMISSION_DENIED


class RequestIdTaken(ThumbloopError):
    """The user has used this request id for another request."""

    code = grpc.StatusCode.ALREADY_EXISTS


class DeadlineExceeded(ThumbloopError):
    """There was no answer within the time that the caller, or the server's own limit, gave."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class PolicyVersionUnavailable(ThumbloopError):
    """The version exists, but the engine does not hold it."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class FeedbackTooLate(ThumbloopError):
    """The reply was given longer ago than it may be rated."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class VersionConflict(ThumbloopError):
    """The current version is not the one the caller saw."""

    code = grpc.StatusCode.ABORTED


class Overloaded(ThumbloopError):
    """The server has as much to do as its limits allow."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class ReaderTooSlow(Overloaded):
    """A stream's reader left more text unread than the server keeps for it."""


class Unavailable(ThumbloopError):
    """The server cannot answer now; a retry may succeed."""

    code = grpc.StatusCode.UNAVAILABLE


class Draining(Unavailable):
    """The server is shutting down and takes no new requests."""


class EngineUnavailable(Unavailable):
    """The engine died or is starting."""


class CorruptedReply(ThumbloopError):
    """The engine's numbers for a reply are none (NaN, infinite): what it sampled says nothing."""


class ScorerUnavailable(Unavailable):
    """A reward model beside the engine failed; replies do without it."""


class StoreUnavailable(Unavailable):
    """Database or disk did not take a write: locked, full or unreachable."""


class BadPolicyVersion(ThumbloopError):
    """A published version failed verification or attestation; `reason` is a stable word."""

    code = grpc.StatusCode.FAILED_PRECONDITION

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {message}")


class StoreIncompatible(ThumbloopError):
    """The store was written by a newer release of this software."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class SettingsError(ThumbloopError):
    """The configuration cannot work; the message names the setting and what to do."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class BadDataFile(ThumbloopError):
    """A file of data, or a copy, cannot be read or written as it was asked for."""

    code = grpc.StatusCode.FAILED_PRECONDITION
