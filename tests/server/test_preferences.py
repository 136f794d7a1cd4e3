"""SubmitPreference over the wire."""

import asyncio

import grpc
import pytest

from tests.refusals import fields, refused
from tests.serving import Running
from thumbloop.client import GenerateOptions
from thumbloop.store import preferences, reading
from thumbloop.types import DEFAULT_POLICY
from thumbloop.v1 import feedback_pb2


@pytest.fixture
async def reply(server: Running) -> str:
    """A reply to Ann that was chosen from three candidates."""
    options = GenerateOptions(num_candidates=3, include_candidates=True)
    return (await server.client.generate("hello", user_id="ann", options=options)).response_id


def preference(reply: str, /, **changes: object) -> feedback_pb2.SubmitPreferenceRequest:
    values = {"response_id": reply, "better_index": 2, "user_id": "ann"} | changes
    return feedback_pb2.SubmitPreferenceRequest(**values)


def stored(server: Running) -> list[tuple[int, int]]:
    assert server.database is not None
    with reading(server.database) as connection:
        compared = preferences.list_compared(connection, DEFAULT_POLICY)
    return [(c.better.index, c.worse.index) for c in compared]


async def test_a_preference_is_stored_before_it_is_acknowledged(server: Running, reply: str):
    answer = await server.client.prefer(reply, better=2, worse=0, user_id="ann")
    assert (answer.preference_id, answer.duplicate) == (1, False)
    assert stored(server) == [(2, 0)]


async def test_a_retry_counts_once_even_when_both_arrive_together(server: Running, reply: str):
    request = preference(reply, request_id="q")
    answers = await asyncio.gather(*(server.feedback.SubmitPreference(request) for _ in range(8)))
    assert {a.preference_id for a in answers} == {1}
    assert sorted(a.duplicate for a in answers) == [False] + [True] * 7


async def test_strangers_and_unknown_replies_are_answered_in_the_same_words(
    server: Running, reply: str
):
    unknown = await refused(server.feedback.SubmitPreference(preference("never given")))
    foreign = await refused(server.feedback.SubmitPreference(preference(reply, user_id="bob")))
    assert unknown.code() is foreign.code() is grpc.StatusCode.NOT_FOUND
    assert unknown.details() == foreign.details()
    assert stored(server) == []


async def test_candidates_that_nobody_was_shown_cannot_be_compared(server: Running):
    options = GenerateOptions(num_candidates=3)
    unseen = await server.client.generate("hello", user_id="ann", options=options)
    error = await refused(server.feedback.SubmitPreference(preference(unseen.response_id)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(error) == ["response_id"]
    assert stored(server) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"response_id": ""}, ["response_id"]),
        ({"better_index": 0}, ["worse_index"]),
        ({"better_index": 3}, ["better_index"]),
        ({"worse_index": 2**32 - 1}, ["worse_index"]),
        ({"user_id": "u" * 257}, ["user_id"]),
        ({"user_id": "u\0"}, ["user_id"]),
        ({"request_id": "r" * 129}, ["request_id"]),
    ],
)
async def test_a_preference_that_is_none_is_refused(server: Running, reply: str, changes, expected):
    error = await refused(server.feedback.SubmitPreference(preference(reply, **changes)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields(error) == expected
    assert stored(server) == []
