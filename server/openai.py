"""Protocol buffers -> OpenAI's JSON: replies, streams, models and errors as its clients read them."""

import math
import time
from collections.abc import Mapping
from typing import Any

from server.bodies import SEPARATOR, ChatBody, CompletionBody
from thumbloop.errors import InvalidRequest, Overloaded, ThumbloopError
from thumbloop.types import DEFAULT_POLICY
from thumbloop.v1 import feedback_pb2, policy_pb2

_FINISH = {policy_pb2.FINISH_REASON_STOP: "stop"}  # whatever else cut it short: "length"
_FIELDS = {
    "text": "prompt",
    "chat.messages": "messages",
    "user_id": "user",
    "guidance.strategy_name": "guidance.strategy",
}


class Shape:
    """What the answers to one kind of completion look like, whole and in pieces."""

    def __init__(self, body: ChatBody | CompletionBody) -> None:
        self._is_chat = isinstance(body, ChatBody)
        self._model = body.model
        self._created = int(time.time())
        self._has_usage = body.has_usage
        self.has_candidates = body.include_candidates

    def whole(self, response: policy_pb2.GenerateResponse) -> dict[str, Any]:
        """Return a reply."""
        said = (
            {"message": {"role": "assistant", "content": response.text}}
            if self._is_chat
            else {"text": response.text}
        )
        return self._of(response.response_id, "", said, _finish_of(response)) | {
            "usage": _usage_of(response),
            "thumbloop": _beside(response),
        }

    def opening(self, response_id: str) -> list[dict[str, Any]]:
        """Return what comes before the text of a stream."""
        if not self._is_chat:
            return []
        return [self._chunk(response_id, {"role": "assistant", "content": ""}, None)]

    def piece(self, response_id: str, text: str) -> dict[str, Any]:
        """Return a piece of text."""
        return self._chunk(response_id, {"content": text} if self._is_chat else text, None)

    def closing(self, response: policy_pb2.GenerateResponse) -> list[dict[str, Any]]:
        """Return what comes after the text of a stream."""
        name = response.response_id
        last = self._chunk(name, {} if self._is_chat else "", _finish_of(response))
        chunks = [last | {"thumbloop": _beside(response)}]
        if self._has_usage:
            empty = self._chunk(name, {} if self._is_chat else "", None)
            chunks.append(empty | {"choices": [], "usage": _usage_of(response)})
        return chunks

    def _chunk(self, response_id: str, said: Any, finish_reason: str | None) -> dict[str, Any]:
        given = {"delta" if self._is_chat else "text": said}
        return self._of(response_id, ".chunk" if self._is_chat else "", given, finish_reason)

    def _of(
        self, response_id: str, suffix: str, said: Mapping[str, Any], finish_reason: str | None
    ) -> dict[str, Any]:
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {
            "id": response_id,
            "object": kind + suffix,
            "created": self._created,
            "model": self._model,
            "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}],
        }


def _finish_of(response: policy_pb2.GenerateResponse) -> str:
    return _FINISH.get(response.finish_reason, "length")


def _usage_of(response: policy_pb2.GenerateResponse) -> dict[str, int]:
    usage = response.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.reply_tokens,
        "total_tokens": usage.prompt_tokens + usage.reply_tokens,
    }


def _beside(response: policy_pb2.GenerateResponse) -> dict[str, Any]:
    """Return what OpenAI's answers have no place for."""
    return {
        "policy_version": response.policy_version,
        "reward": response.reward if response.HasField("reward") else None,
        "reranked": response.reranked,
        "num_candidates": response.num_candidates,
        "candidate_tokens": response.usage.candidate_tokens,
        "candidates": [
            {
                "text": candidate.text,
                "reward": candidate.reward if candidate.HasField("reward") else None,
                "finish_reason": _FINISH.get(candidate.finish_reason, "length"),
            }
            for candidate in response.candidates
        ],
    }


def feedback_answer(stored: feedback_pb2.SubmitFeedbackResponse) -> dict[str, Any]:
    """Return what a thumb is answered with."""
    return {
        "object": "feedback",
        "id": stored.feedback_id,
        "policy_version": stored.policy_version,
        "duplicate": stored.duplicate,
    }


def models(strategies: tuple[str, ...]) -> dict[str, Any]:
    """Return the list of models: the policy, and the policy under each strategy."""
    names = [DEFAULT_POLICY, *(f"{DEFAULT_POLICY}{SEPARATOR}{name}" for name in strategies)]
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "thumbloop"} for name in names
        ],
    }


def error_body(error: ThumbloopError, status: int) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    field = error.violations[0].field if isinstance(error, InvalidRequest) else None
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {
        "error": {
            "message": str(error),
            "type": kind,
            "param": None if field is None else _named(field),
            "code": error.code.name.lower(),
        }
    }


def _named(field: str) -> str:
    """Return what the field of our own wire is called here."""
    for ours, theirs in _FIELDS.items():
        if field.startswith(ours):
            return theirs + field.removeprefix(ours)
    return field.removeprefix("sampling.")


def retry_after(error: ThumbloopError) -> dict[str, str]:
    """Return the headers that say when to come back, where the error does: HTTP's, which takes whole
    seconds, and the one that OpenAI's clients look at first."""
    if not isinstance(error, Overloaded):
        return {}
    return {
        "retry-after": f"{max(math.ceil(error.retry_after_s), 1)}",
        "retry-after-ms": f"{max(math.ceil(error.retry_after_s * 1000), 1)}",
    }
