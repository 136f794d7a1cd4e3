"""What a body may say that asks for nothing, and how it reaches our own wire."""

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage
from pydantic import ValidationError

from server.bodies import ChatBody, CompletionBody, FeedbackBody
from thumbloop.v1 import policy_pb2

Body = dict[str, Any]
PLAIN: Body = {"prompt": "The soup was"}
TURN: Body = {"role": "user", "content": "How was it?"}

NEUTRAL: list[Body] = [
    {"frequency_penalty": 0},
    {"presence_penalty": 0.0},
    {"logit_bias": {}},
    {"logprobs": False},
    {"best_of": 1},
    {"echo": False},
    {"suffix": ""},
    {"tools": []},
    {"tool_choice": "auto", "parallel_tool_calls": True},
    {"response_format": {"type": "text"}},
    {"store": False, "metadata": {}},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"unheard_of": None},
]


def completion(**fields: Any) -> policy_pb2.GenerateRequest:
    return CompletionBody.model_validate_json(json.dumps({**PLAIN, **fields})).message()


def chat(*turns: Body) -> list[tuple[int, str]]:
    body = ChatBody.model_validate_json(json.dumps({"messages": turns}))
    return [(turn.role, turn.content) for turn in body.message().chat.messages]


def test_null_is_what_is_not_said():
    for kind, needed in ((CompletionBody, PLAIN), (ChatBody, {"messages": [TURN]})):
        nothing = {name: None for name in kind.model_fields if name not in needed}
        body = kind.model_validate_json(json.dumps({**nothing, **needed}))
        assert body == kind(**needed)
        assert body.message() == kind(**needed).message()
    thumb = {"response_id": "r", "thumb": "up"}
    said_less = {**thumb, "comment": None, "user": None, "request_id": None}
    assert FeedbackBody(**said_less) == FeedbackBody(**thumb)


@pytest.mark.parametrize("neutral", NEUTRAL, ids=lambda neutral: next(iter(neutral)))
def test_what_asks_for_nothing_is_taken(neutral: Body):
    assert completion(**neutral) == completion()


@pytest.mark.parametrize("needed", ["prompt", "response_id"])
def test_what_is_needed_may_not_be_null(needed: str):
    kind = CompletionBody if needed == "prompt" else FeedbackBody
    with pytest.raises(ValidationError, match=rf"{needed}\n  Field required"):
        kind.model_validate_json(json.dumps({needed: None, "thumb": "up"}))


def test_false_is_not_0():
    for field, value in (("logprobs", 0), ("best_of", True), ("frequency_penalty", False)):
        with pytest.raises(ValidationError, match="Extra inputs"):
            completion(**{field: value})


def test_a_turn_may_be_what_openais_client_made_of_a_reply():
    reply = ChatCompletionMessage(role="assistant", content="Good.").model_dump()
    assert {name for name, value in reply.items() if value is None} >= {"refusal", "tool_calls"}
    turns = chat(TURN, {**reply, "annotations": [], "tool_calls": []}, TURN)
    assert turns[1] == (policy_pb2.ROLE_ASSISTANT, "Good.")


def test_a_turn_without_content_is_empty():
    nothing = ChatCompletionMessage(role="assistant", content=None).model_dump()
    assert chat(TURN, nothing)[1] == (policy_pb2.ROLE_ASSISTANT, "")


def test_a_list_of_one_prompt_is_that_prompt():
    assert completion(prompt=["The soup was"]) == completion()


def test_a_seed_below_zero_is_a_seed_of_its_own():
    seeds = [-(2**63), -2, -1, 0, 1, 2**63 - 1]
    heard = [completion(seed=seed).sampling.seed for seed in seeds]
    assert heard == [2**63, 2**64 - 2, 2**64 - 1, 0, 1, 2**63 - 1]
