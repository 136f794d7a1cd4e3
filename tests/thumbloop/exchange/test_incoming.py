from datetime import UTC, datetime
from typing import Any

import pytest

from thumbloop.exchange.files import Line
from thumbloop.exchange.incoming import Item, items_of
from thumbloop.exchange.shapes import Prompts
from thumbloop.v1 import admin_pb2, feedback_pb2, policy_pb2

THUMB = {"prompt": "The sky is", "completion": " blue.", "label": True}
PAIR = {"prompt": "The sky is", "chosen": " blue.", "rejected": " red."}
USER, ASSISTANT = policy_pb2.ROLE_USER, policy_pb2.ROLE_ASSISTANT


def read(record: Any, plain: Prompts = Prompts.TEXT, user: str = "") -> Item:
    (item,) = items_of([Line(7, record)], "data.jsonl", plain, user)
    return item


def feedback(record: Any, **how: Any) -> admin_pb2.ImportedFeedback:
    item = read(record, **how)
    assert item.feedback is not None, item.problem
    return item.feedback


def turns(item: admin_pb2.ImportedFeedback) -> list[tuple[int, str]]:
    return [(turn.role, turn.content) for turn in item.chat.messages]


def test_a_thumb_on_a_text():
    assert feedback(THUMB) == admin_pb2.ImportedFeedback(
        text="The sky is",
        thumb=admin_pb2.ImportedThumb(reply=" blue.", thumb=feedback_pb2.THUMB_UP),
    )
    assert feedback(THUMB | {"label": 0}).thumb.thumb == feedback_pb2.THUMB_DOWN


def test_a_preference_on_a_text():
    assert feedback(PAIR) == admin_pb2.ImportedFeedback(
        text="The sky is",
        preference=admin_pb2.ImportedPreference(better=" blue.", worse=" red."),
    )


def test_conversations():
    prompt = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How "}, {"text": "was it?"}]},
    ]
    reply = [{"role": "assistant", "content": "Good."}]
    item = feedback({"prompt": prompt, "completion": reply, "label": False})
    assert turns(item) == [(policy_pb2.ROLE_SYSTEM, "Be brief."), (USER, "How was it?")]
    assert item.thumb.reply == "Good."
    item = feedback({"prompt": prompt, "chosen": reply, "rejected": "Bad."})
    assert (item.preference.better, item.preference.worse) == ("Good.", "Bad.")


def test_a_mere_string_may_be_a_users_turn():
    assert turns(feedback(THUMB, plain=Prompts.CHAT)) == [(USER, "The sky is")]


def test_who_said_it_and_what_it_is_called_come_along():
    origin = {"response_id": "r-1", "user_id": "ann", "comment": "lovely", "policy_version": 3}
    item = feedback(THUMB | origin, user="nobody")
    assert (item.user_id, item.source_id, item.thumb.comment) == ("ann", "r-1", "lovely")
    item = feedback(THUMB | {"id": "i-1", "user_id": None}, user="nobody")
    assert (item.user_id, item.source_id) == ("nobody", "i-1")


@pytest.mark.parametrize(
    "written",
    [
        "2026-01-02T03:04:05.250000+00:00",
        "2026-01-02T04:04:05.250+01:00",
        "2026-01-02 03:04:05.25Z",
        "2026-01-02 03:04:05.250000",
        1767323045.25,
        datetime(2026, 1, 2, 3, 4, 5, 250_000),
        datetime(2026, 1, 2, 3, 4, 5, 250_000, tzinfo=UTC),
    ],
)
@pytest.mark.parametrize("field", ["created_at", "timestamp"])
def test_times_are_utc_unless_they_say_otherwise(field: str, written: object):
    assert feedback(THUMB | {field: written}).said_at.ToNanoseconds() == 1767323045250000000
    assert not feedback(THUMB).HasField("said_at")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "a"}, "prompt: has to be a text, or a list of messages"),
        ({"prompt": "a"}, "record: has to hold prompt, completion and label"),
        ({"prompt": "a", "label": True}, "completion: has to be a text"),
        ({"prompt": "a", "chosen": "b"}, "rejected: has to be a text"),
        (THUMB | {"label": "yes"}, "label: has to be true or false"),
        (THUMB | {"label": None}, "label: has to be true or false"),
        (THUMB | {"prompt": []}, "prompt: has to be a text, or a list of messages"),
        (THUMB | {"prompt": ["a"]}, "prompt[0]: has to be a message"),
        (THUMB | {"prompt": [{"role": "tool", "content": "a"}]}, "prompt[0].role: has to be"),
        (THUMB | {"prompt": [{"role": "user"}]}, "prompt[0].content: has to be a text"),
        (THUMB | {"completion": [{"role": "user", "content": "a"}]}, "completion: has to be"),
        (THUMB | {"completion": []}, "completion: has to be a text"),
        (THUMB | {"user_id": 3}, "user_id: has to be a text"),
        (THUMB | {"created_at": "yesterday"}, "created_at: has to be a time"),
        (THUMB | {"created_at": 1e300}, "created_at: has to be a time"),
        (THUMB | {"created_at": True}, "created_at: has to be a time"),
        (THUMB | {"completion": "\ud800"}, "holds what is no Unicode text"),
    ],
)
def test_what_is_wrong_is_said_of_its_line(record: Any, problem: str):
    item = read(record)
    assert (item.place, item.feedback) == ("data.jsonl:7", None)
    assert item.problem.startswith(problem)


def test_a_line_that_is_no_record_stays_where_it_is():
    lines = [Line(1, THUMB), Line(2, None, "is no JSON"), Line(4, PAIR)]
    items = list(items_of(lines, "f", Prompts.TEXT, ""))
    assert [item.place for item in items] == ["f:1", "f:2", "f:4"]
    assert [item.problem for item in items] == ["", "is no JSON", ""]
