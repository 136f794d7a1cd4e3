"""Scores and traces as Langfuse's exports (snake case) and its API (camel case) have them."""

import json
from typing import Any

import pytest

from thumbloop.exchange.files import Line
from thumbloop.exchange.incoming import Item
from thumbloop.exchange.langfuse import Scores, is_score, items_of
from thumbloop.exchange.shapes import Prompts
from thumbloop.v1 import feedback_pb2

SCORE = {
    "id": "s-1",
    "timestamp": "2026-01-02 03:04:05.000000",
    "trace_id": "t-1",
    "observation_id": None,
    "name": "user-feedback",
    "value": 1,
    "source": "API",
    "comment": "lovely",
    "data_type": "BOOLEAN",
    "string_value": None,
}
TRACE = {
    "id": "t-1",
    "user_id": "ann",
    "input": "How was it?",
    "output": "Good.",
}
FROM_API = (
    {
        "id": "s-1",
        "timestamp": "2026-01-02T03:04:05.000Z",
        "traceId": "t-1",
        "name": "user-feedback",
        "value": 1,
        "comment": "lovely",
        "dataType": "BOOLEAN",
        "stringValue": "True",
    },
    {"id": "t-1", "userId": "ann", "input": "How was it?", "output": "Good."},
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How was it?"}]
ANSWER = {"role": "assistant", "content": "Good."}


def read(
    scores: list[Any],
    traces: list[Any],
    which: Scores = Scores(),  # noqa: B008
    plain: Prompts = Prompts.CHAT,
) -> list[Item]:
    numbered = [Line(i, record) for i, record in enumerate(scores, start=1)]
    told = [Line(i, record) for i, record in enumerate(traces, start=1)]
    return list(items_of(numbered, "scores.jsonl", told, which, plain, "somebody"))


def contents(item: Item) -> list[str]:
    assert item.feedback is not None, item.problem
    return [turn.content for turn in item.feedback.chat.messages]


@pytest.mark.parametrize(("score", "trace"), [(SCORE, TRACE), FROM_API])
def test_a_score_is_a_thumb_on_what_its_trace_says(score: Any, trace: Any):
    (item,) = read([score], [{"id": "t-0", "input": "a", "output": "b"}, trace])
    assert contents(item) == ["How was it?"]
    found = item.feedback
    assert found is not None
    assert (found.thumb.reply, found.thumb.thumb) == ("Good.", feedback_pb2.THUMB_UP)
    assert (found.thumb.comment, found.user_id, found.source_id) == ("lovely", "ann", "s-1")
    assert found.said_at.seconds == 1767323045
    assert item.place == "scores.jsonl:1"
    assert is_score(score)


def test_a_mere_string_may_be_a_text_to_continue():
    (item,) = read([SCORE], [TRACE], plain=Prompts.TEXT)
    assert item.feedback is not None
    assert item.feedback.text == "How was it?"


@pytest.mark.parametrize(
    "given",
    [
        MESSAGES,
        json.dumps(MESSAGES),
        {"messages": MESSAGES, "model": "m"},
        json.dumps({"messages": MESSAGES}),
    ],
)
def test_messages_go_in_as_they_are_or_as_text(given: object):
    (item,) = read([SCORE], [TRACE | {"input": given}])
    assert contents(item) == ["Be brief.", "How was it?"]


@pytest.mark.parametrize(
    "given",
    [
        "Good.",
        '"Good."',
        ANSWER,
        json.dumps(ANSWER),
        [ANSWER],
        [*MESSAGES, ANSWER],
        {"messages": [*MESSAGES, ANSWER]},
        {"content": "Good."},
        {"content": [{"type": "text", "text": "Good."}]},
        {"choices": [{"index": 0, "message": ANSWER}]},
    ],
)
def test_replies_come_out_in_many_forms(given: object):
    (item,) = read([SCORE], [TRACE | {"output": given}])
    assert item.feedback is not None, item.problem
    assert item.feedback.thumb.reply == "Good."


def test_a_reply_that_is_json_of_its_own_is_the_text_it_is():
    (item,) = read([SCORE], [TRACE | {"output": '{"answer": 3}'}])
    assert item.feedback is not None, item.problem
    assert item.feedback.thumb.reply == '{"answer": 3}'


def test_a_score_may_be_of_an_observation_or_of_the_root_of_a_trace():
    root = {"id": "o-1", "trace_id": "t-1", "parent_observation_id": "", "user_id": "ann"}
    child = {"id": "o-2", "trace_id": "t-1", "parent_observation_id": "o-1"}
    observations = [
        child | {"input": "inner", "output": "inner"},
        root | {"input": "outer", "output": "outer"},
    ]
    of_child = SCORE | {"id": "s-2", "observation_id": "o-2"}
    inner, outer = read([SCORE, of_child], observations)
    assert (contents(inner), inner.place) == (["inner"], "scores.jsonl:2")
    assert (contents(outer), outer.place) == (["outer"], "scores.jsonl:1")


@pytest.mark.parametrize(
    ("value", "up_from", "is_up"),
    [
        (1, None, True),
        (True, None, True),
        (0, None, False),
        (-1, None, False),
        (4, 4.0, True),
        (3.5, 4.0, False),
    ],
)
def test_values_are_thumbs(value: float, up_from: float | None, is_up: bool):
    scored = SCORE | {"value": value, "data_type": "NUMERIC"}
    (item,) = read([scored], [TRACE], Scores(up_from=up_from))
    assert item.feedback is not None, item.problem
    assert (item.feedback.thumb.thumb == feedback_pb2.THUMB_UP) is is_up


def test_scores_of_other_names_are_passed_over():
    other = SCORE | {"name": "helpfulness", "value": 0.3, "data_type": "CATEGORICAL"}
    assert read([other], [TRACE]) == []
    (item,) = read([other | {"data_type": "NUMERIC"}], [TRACE], Scores("helpfulness", 0.25))
    assert item.feedback is not None


def test_several_thumbs_on_one_trace_are_all_there():
    ups = read([SCORE, SCORE | {"id": "s-2", "value": 0}], [TRACE])
    assert [item.feedback.source_id for item in ups if item.feedback] == ["s-1", "s-2"]


@pytest.mark.parametrize(
    ("score", "trace", "problem"),
    [
        (SCORE | {"value": 0.5}, TRACE, "value: 0.5 is no thumb; say --up-from"),
        (SCORE | {"data_type": "CATEGORICAL"}, TRACE, "value: of CATEGORICAL is no thumb"),
        (SCORE | {"value": "up"}, TRACE, "value: of BOOLEAN is no thumb"),
        (SCORE | {"trace_id": None}, TRACE, "trace_id: is missing"),
        (SCORE, TRACE | {"id": "t-2"}, "there is no trace t-1 with an output"),
        (SCORE, TRACE | {"output": None}, "there is no trace t-1 with an output"),
        (SCORE | {"observation_id": "o"}, TRACE, "there is no observation o with an output"),
        (SCORE, TRACE | {"input": None}, "input: has to be a text, or a list of messages"),
        (SCORE, TRACE | {"input": {"question": "a"}}, "input[0].role: has to be"),
        (SCORE, TRACE | {"output": {"answer": 3}}, "output: has to be a text"),
        (SCORE, TRACE | {"user_id": 3}, "user_id: has to be a text"),
        ({"prompt": "a"}, TRACE, "record: has to be a score"),
        (None, TRACE, "record: "),
    ],
)
def test_what_is_wrong_is_said_of_its_line(score: Any, trace: Any, problem: str):
    (item,) = read([score], [trace])
    assert (item.place, item.feedback) == ("scores.jsonl:1", None)
    assert item.problem.startswith(problem)
