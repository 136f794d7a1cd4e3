"""Our errors on the wire: as google.rpc.Status with details, and back."""

from typing import TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from thumbloop.errors import (
    MOST_BYTES,
    DeadlineExceeded,
    FeedbackTooLate,
    FieldViolation,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    PolicyVersionUnavailable,
    RequestIdTaken,
    ThumbloopError,
    Unauthenticated,
    Unavailable,
    VersionConflict,
    clipped,
)

M = TypeVar("M", bound=Message)

_PLAIN = {
    kind.code: kind
    for kind in (
        DeadlineExceeded,
        NotFound,
        PermissionDenied,
        PolicyVersionUnavailable,
        RequestIdTaken,
        Unauthenticated,
        Unavailable,
        VersionConflict,
    )
}


_TOO_LATE = "FEEDBACK_TOO_LATE"
"""What tells it from the other preconditions that may fail."""


def status_of(error: ThumbloopError) -> status_pb2.Status:
    """Return an error as its callers get it, its words clipped to what headers have room for."""
    code = getattr(code_pb2, error.code.name)
    words = clipped(str(error), MOST_BYTES)
    return status_pb2.Status(code=code, message=words, details=_details(error))


def _details(error: ThumbloopError) -> list[any_pb2.Any]:
    packed = any_pb2.Any()
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation
        found = [violation(field=v.field, description=v.description) for v in error.violations]
        packed.Pack(error_details_pb2.BadRequest(field_violations=found))
    elif isinstance(error, Overloaded):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        packed.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    elif isinstance(error, FeedbackTooLate):
        violation = error_details_pb2.PreconditionFailure.Violation(type=_TOO_LATE)
        packed.Pack(error_details_pb2.PreconditionFailure(violations=[violation]))
    else:
        return []
    return [packed]


def error_of(failed: grpc.RpcError) -> ThumbloopError:
    """Return the error that a failed call means; one of no kind of ours is a ThumbloopError."""
    code, words = failed.code(), failed.details() or ""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        request = _detail(failed, error_details_pb2.BadRequest())
        violations = [FieldViolation(v.field, v.description) for v in request.field_violations]
        invalid = InvalidRequest(*violations or [FieldViolation("", words)])
        invalid.args = (words,)  # which also say how many were not named
        return invalid
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        delay = _detail(failed, error_details_pb2.RetryInfo()).retry_delay
        return Overloaded(words, retry_after_s=delay.seconds + delay.nanos / 1e9)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        failure = _detail(failed, error_details_pb2.PreconditionFailure())
        if any(violation.type == _TOO_LATE for violation in failure.violations):
            return FeedbackTooLate(words)
    if code in _PLAIN:
        return _PLAIN[code](words)
    unknown = ThumbloopError(words)
    unknown.code = code
    return unknown


def _detail(failed: grpc.RpcError, empty: M) -> M:
    """Return the detail of this kind, or the empty one."""
    status = rpc_status.from_call(failed)
    for packed in status.details if status is not None else ():
        if packed.Unpack(empty):
            break
    return empty
