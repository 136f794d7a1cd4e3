"""FeedbackService over the wire."""

import asyncio

import grpc
import pytest

from tests.refusals import fields, refused
from tests.serving import Running
from thumbloop.store import feedback, reading
from thumbloop.types import DEFAULT_POLICY
from thumbloop.v1 import feedback_pb2

UP, DOWN = feedback_pb2.THUMB_UP, feedback_pb2.THUMB_DOWN


@pytest.fixture
async def reply(server: Running) -> str:
    """A reply to Ann."""
    return (await server.generate("hello", user_id="ann")).response_id


def counts(server: Running) -> tuple[int, int]:
    assert server.database is not None
    with reading(server.database) as connection:
        return feedback.counts(connection)


def thumb(reply: str, /, **changes: object) -> feedback_pb2.SubmitFeedbackRequest:
    values = {"response_id": reply, "thumb": UP, "user_id": "ann"} | changes
    return feedback_pb2.SubmitFeedbackRequest(**values)


async def test_a_thumb_is_stored_before_it_is_acknowledged(server: Running, reply: str):
    answer = await server.client.rate(reply, up=True, user_id="ann", comment="lovely")
    assert (answer.feedback_id, answer.policy_version, answer.duplicate) == (1, 0, False)
    assert server.database is not None
    with reading(server.database) as connection:
        (rated,) = feedback.list_rated(connection, DEFAULT_POLICY)
    assert (rated.response_id, rated.value) == (reply, 1)
    assert rated.candidate.chosen


async def test_a_retry_counts_once_even_when_both_arrive_together(server: Running, reply: str):
    request = thumb(reply, request_id="q")
    answers = await asyncio.gather(*(server.feedback.SubmitFeedback(request) for _ in range(8)))
    assert {a.feedback_id for a in answers} == {1}
    assert sorted(a.duplicate for a in answers) == [False] + [True] * 7
    assert counts(server) == (1, 1)


async def test_the_last_thumb_counts(server: Running, reply: str):
    for value in (UP, DOWN, UP, DOWN):
        await server.feedback.SubmitFeedback(thumb(reply, thumb=value))
    assert counts(server) == (4, 1)
    assert server.database is not None
    with reading(server.database) as connection:
        assert [r.value for r in feedback.list_rated(connection, DEFAULT_POLICY)] == [0]


async def test_strangers_and_unknown_replies_are_answered_in_the_same_words(
    server: Running, reply: str
):
    unknown = await refused(server.feedback.SubmitFeedback(thumb("never given")))
    foreign = await refused(server.feedback.SubmitFeedback(thumb(reply, user_id="bob")))
    nobody = await refused(server.feedback.SubmitFeedback(thumb(reply, user_id="")))
    for error in (unknown, foreign, nobody):
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert error.details() == unknown.details()
    assert counts(server) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"thumb": feedback_pb2.THUMB_UNSPECIFIED}, ["thumb"]),
        ({"thumb": 9}, ["thumb"]),
        ({"response_id": ""}, ["response_id"]),
        ({"comment": "c" * 4097}, ["comment"]),
        ({"user_id": "u" * 257}, ["user_id"]),
        ({"request_id": "r" * 129}, ["request_id"]),
        ({"response_id": "", "thumb": 0}, ["response_id", "thumb"]),
    ],
)
async def test_a_thumb_that_is_none_is_refused(server: Running, reply: str, changes, expected):
    error = await refused(server.feedback.SubmitFeedback(thumb(reply, **changes)))
    assert fields(error) == expected
    assert counts(server) == (0, 0)
