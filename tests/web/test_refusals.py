"""What people read when a call came to nothing."""

import grpc
import pytest

from thumbloop import errors
from web.refusals import in_words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.EngineUnavailable("the engine died"), "The server does not answer now."),
        (errors.Overloaded("full", retry_after_s=0.2), "Try again in a second."),
        (errors.Overloaded("full", retry_after_s=3.1), "Try again in 4 seconds."),
        (errors.InvalidRequest.of("chat", "too long"), "chat: too long"),
        (errors.DeadlineExceeded("late"), "took too long"),
        (errors.UnknownResponse("none"), "does not know this reply"),
        (errors.FeedbackTooLate("old"), "too old to be rated"),
        (errors.Unauthenticated("who?"), "token"),
        (errors.PermissionDenied("no"), "scope"),
        (errors.VersionConflict("other"), "(ABORTED)"),
    ],
)
def test_every_refusal_has_plain_words(error: errors.ThumbloopError, words: str):
    assert words in in_words(error)


def test_an_error_of_no_kind_of_ours_is_named_by_its_status():
    unknown = errors.ThumbloopError("bang")
    unknown.code = grpc.StatusCode.DATA_LOSS
    assert "(DATA_LOSS)" in in_words(unknown)
