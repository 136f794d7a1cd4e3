"""What the wire makes of our errors, and what a client makes of what came over it."""

import inspect
from base64 import b64encode
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from thumbloop import errors
from thumbloop.errors import (
    DeadlineExceeded,
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
)
from thumbloop.statuses import error_of, status_of

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ThumbloopError)
]
CALLERS = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.ALREADY_EXISTS: RequestIdTaken,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.FAILED_PRECONDITION: PolicyVersionUnavailable,
    grpc.StatusCode.ABORTED: VersionConflict,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}
"""What a caller catches, by status; whatever else is a ThumbloopError."""


class Failed(grpc.RpcError):
    """A call that failed, as a client finds it."""

    def __init__(self, code: grpc.StatusCode, words: str | None, trailer: Any = ()) -> None:
        self._code = code
        self._words = words
        self._trailer = trailer

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._words

    def trailing_metadata(self) -> Any:
        return self._trailer


def sent(error: ThumbloopError) -> Failed:
    """Return the failed call that an error of the server becomes."""
    status = rpc_status.to_status(status_of(error))
    return Failed(status.code, status.details, status.trailing_metadata)


def example(kind: type[ThumbloopError]) -> ThumbloopError:
    if kind is InvalidRequest:
        return InvalidRequest.of("text", "is empty")
    if issubclass(kind, Overloaded):
        return kind("the words", retry_after_s=0.25)
    if kind is errors.BadPolicyVersion:
        return errors.BadPolicyVersion("not_finite", "the words")
    return kind("the words")


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_arrives_as_what_its_status_means_in_the_same_words(
    kind: type[ThumbloopError],
):
    error = example(kind)
    arrived = error_of(sent(error))
    told_apart = kind is errors.FeedbackTooLate  # by a detail
    assert type(arrived) is (kind if told_apart else CALLERS.get(kind.code, ThumbloopError))
    assert arrived.code is kind.code
    assert str(arrived) == str(error)


def test_every_field_that_was_wrong_arrives():
    error = InvalidRequest(FieldViolation("text", "is empty"), FieldViolation("seed", "is odd"))
    (packed,) = status_of(error).details
    request = error_details_pb2.BadRequest()
    assert packed.Unpack(request)
    assert [v.field for v in request.field_violations] == ["text", "seed"]
    arrived = error_of(sent(error))
    assert isinstance(arrived, InvalidRequest)
    assert arrived.violations == error.violations


def test_how_many_fields_were_not_named_arrives():
    error = InvalidRequest(*[FieldViolation(f"stop[{i}]", "is empty") for i in range(100)])
    arrived = error_of(sent(error))
    assert isinstance(arrived, InvalidRequest)
    assert (str(arrived), arrived.violations) == (str(error), error.violations)


def header_bytes(error: ThumbloopError) -> int:
    """Return what a refusal takes of a call's headers, by HTTP/2's reckoning (RFC 9113, 6.5.2)."""
    status = rpc_status.to_status(status_of(error))
    message = "".join(c if " " <= c <= "~" and c != "%" else quote(c, "") for c in status.details)
    ((key, packed),) = status.trailing_metadata
    pairs = [("grpc-message", message), (key, b64encode(packed).decode()), ("grpc-status", "16")]
    return sum(len(name) + len(value) + 32 for name, value in pairs)


@pytest.mark.parametrize("letter", ["a", "%", "\n", "\u00fc", "\u4e2d", "\U0001f600"])
@pytest.mark.parametrize("length", [1, 10, 50, 70, 100, 1_000, 100_000])
def test_whatever_is_said_fits_into_headers(letter: str, length: int):
    """gRPC's clients drop trailers of more than 8 KiB, and say RESOURCE_EXHAUSTED instead."""
    words = letter * length
    for error in (
        InvalidRequest.of(words, words),
        InvalidRequest(*[FieldViolation(words, words)] * 100),
        InvalidRequest(*[FieldViolation("f", words)] * 16),
        Overloaded(words, retry_after_s=1),
    ):
        assert header_bytes(error) < 8 * 1024 - 300  # content-type and what proxies add


@pytest.mark.parametrize("seconds", [0.0, 0.25, 1.5, 3600.000001])
def test_when_to_come_back_arrives(seconds: float):
    error = Overloaded("full", retry_after_s=seconds)
    (packed,) = status_of(error).details
    delay = error_details_pb2.RetryInfo()
    assert packed.Unpack(delay)
    assert delay.retry_delay.ToNanoseconds() / 1e9 == pytest.approx(seconds, abs=1e-8)
    arrived = error_of(sent(error))
    assert isinstance(arrived, Overloaded)
    assert arrived.retry_after_s == pytest.approx(seconds, abs=1e-8)


def test_errors_without_details_have_none():
    status = status_of(NotFound("nothing there"))
    assert (status.code, status.message) == (code_pb2.NOT_FOUND, "nothing there")
    assert list(status.details) == []


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not code.OK])
def test_a_status_that_somebody_else_made_is_an_error_too(code: grpc.StatusCode):
    """gRPC itself, and what stands between us and the server, sends no details."""
    arrived = error_of(Failed(code, "the words"))
    assert type(arrived) is CALLERS.get(code, ThumbloopError)
    assert arrived.code is code
    assert "the words" in str(arrived)
    assert isinstance(error_of(Failed(code, None)), ThumbloopError)


def test_an_unknown_status_does_not_change_what_others_have():
    error_of(Failed(grpc.StatusCode.DATA_LOSS, "lost"))
    assert ThumbloopError.code is grpc.StatusCode.INTERNAL


def test_details_of_another_kind_are_passed_over():
    status = status_of(Overloaded("full", retry_after_s=2.0))
    status.details[0].Pack(error_details_pb2.DebugInfo(detail="a trace"))
    sent = rpc_status.to_status(status)
    arrived = error_of(Failed(sent.code, sent.details, sent.trailing_metadata))
    assert isinstance(arrived, Overloaded)
    assert arrived.retry_after_s == 0.0
