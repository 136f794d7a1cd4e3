"""OpenAI's JSON <-> protocol buffers: one more way to say the same, checked where all requests are."""

import math
import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thumbloop.errors import FieldViolation, InvalidRequest, Overloaded, ThumbloopError
from thumbloop.types import DEFAULT_POLICY
from thumbloop.v1 import feedback_pb2, policy_pb2

SEPARATOR = ":"
"""Between a policy's name and a strategy's, in the name of a model."""

_ROLES = {
    "system": policy_pb2.ROLE_SYSTEM,
    "developer": policy_pb2.ROLE_SYSTEM,
    "user": policy_pb2.ROLE_USER,
    "assistant": policy_pb2.ROLE_ASSISTANT,
}
_THUMBS = {"up": feedback_pb2.THUMB_UP, "down": feedback_pb2.THUMB_DOWN}
_LEARNING = {"allowed": policy_pb2.LEARNING_ALLOWED, "excluded": policy_pb2.LEARNING_EXCLUDED}
_FINISH = {policy_pb2.FINISH_REASON_STOP: "stop"}  # whatever else cut it short: "length"
_UNKNOWN = "is not served here"
_FIELDS = {
    "text": "prompt",
    "chat.messages": "messages",
    "user_id": "user",
    "guidance.strategy_name": "guidance.strategy",
}

UInt32 = Annotated[int, Field(ge=0, lt=2**32)]
UInt64 = Annotated[int, Field(ge=0, lt=2**64)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Body(BaseModel):
    """What a caller sends; a field that is not known is refused, not overlooked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Body):
    """A piece of a turn; of text, as nothing else can be read here."""

    type: Literal["text"]
    text: str


class Turn(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """Return the content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class GuidanceBody(_Body):
    """How the reply is chosen."""

    strategy: str = ""
    num_candidates: UInt32 | None = None
    temperature: float | None = None


class StreamOptions(_Body):
    """What a stream says beside text."""

    include_usage: bool = False


class _GenerateBody(_Body):
    """What both kinds of completion take: OpenAI's fields, then ours."""

    model: str = DEFAULT_POLICY
    max_tokens: UInt32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: UInt64 | None = None
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""

    top_k: UInt32 | None = None
    guidance: GuidanceBody = GuidanceBody()
    learning: Literal["allowed", "excluded"] = "allowed"
    session_id: str = ""
    request_id: str = ""
    policy_version: Int64 | None = None
    include_candidates: bool = False

    @property
    def has_usage(self) -> bool:
        """Say whether a stream ends with what it cost."""
        return self.stream_options is not None and self.stream_options.include_usage

    def message(self) -> policy_pb2.GenerateRequest:
        """Return the request on our own wire. Raises InvalidRequest."""
        policy, _, strategy = self.model.partition(SEPARATOR)
        if strategy and self.guidance.strategy:
            raise InvalidRequest.of("guidance.strategy", "the model's name says one already")
        message = policy_pb2.GenerateRequest(
            sampling=policy_pb2.SamplingParams(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                seed=self.seed,
                stop=[self.stop] if isinstance(self.stop, str) else self.stop or [],
            ),
            guidance=policy_pb2.GuidanceParams(
                num_candidates=self.guidance.num_candidates,
                temperature=self.guidance.temperature,
                strategy_name=strategy or self.guidance.strategy,
            ),
            learning=_LEARNING[self.learning],
            policy=policy,
            user_id=self.user,
            session_id=self.session_id,
            request_id=self.request_id,
            policy_version=self.policy_version,
            include_candidates=self.include_candidates,
        )
        self._set_prompt(message)
        return message

    @abstractmethod
    def _set_prompt(self, message: policy_pb2.GenerateRequest) -> None:
        """Put what is to be answered into the request."""


class ChatBody(_GenerateBody):
    """A body of /v1/chat/completions."""

    messages: list[Turn]
    max_completion_tokens: UInt32 | None = None

    def _set_prompt(self, message: policy_pb2.GenerateRequest) -> None:
        if self.max_completion_tokens is not None:
            message.sampling.max_tokens = self.max_completion_tokens
        message.chat.SetInParent()
        message.chat.messages.extend(
            policy_pb2.ChatMessage(role=_ROLES[turn.role], content=turn.text)
            for turn in self.messages
        )


class CompletionBody(_GenerateBody):
    """A body of /v1/completions."""

    prompt: str

    def _set_prompt(self, message: policy_pb2.GenerateRequest) -> None:
        message.text = self.prompt


class FeedbackBody(_Body):
    """A body of /v1/feedback."""

    response_id: str
    thumb: Literal["up", "down"]
    comment: str = ""
    user: str = ""
    request_id: str = ""

    def message(self) -> feedback_pb2.SubmitFeedbackRequest:
        """Return the thumb on our own wire."""
        return feedback_pb2.SubmitFeedbackRequest(
            response_id=self.response_id,
            thumb=_THUMBS[self.thumb],
            comment=self.comment,
            user_id=self.user,
            request_id=self.request_id,
        )


class Shape:
    """What the answers to one kind of completion look like, whole and in pieces."""

    def __init__(self, body: _GenerateBody) -> None:
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


def unreadable(error: ValidationError) -> InvalidRequest:
    """Return the error of a body that does not have the right fields."""
    return InvalidRequest(
        *(
            FieldViolation(
                ".".join(str(part) for part in found["loc"]) or "body",
                _UNKNOWN if found["type"] == "extra_forbidden" else found["msg"],
            )
            for found in error.errors(include_url=False)
        )
    )


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
