"""OpenAI's JSON -> protocol buffers: what callers send, checked further where all requests are."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from thumbloop.errors import FieldViolation, InvalidRequest
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
_UNKNOWN = "is not served here"

UInt32 = Annotated[int, Field(ge=0, lt=2**32)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]  # OpenAI's have a sign, ours have not
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Body(BaseModel):
    """What a caller sends; a field that is not known is refused, not overlooked.

    Clients send much that asks for nothing: null, and the fields of `neutral` with one of these values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if value is not None and not cls._is_neutral(name, value)
        }

    @classmethod
    def _is_neutral(cls, name: str, value: Any) -> bool:
        values = cls.neutral.get(name, ())
        return any(type(value) is type(one) and value == one for one in values)  # 0 == False


class TextPart(_Body):
    """A piece of a turn; of text, as nothing else can be read here."""

    type: Literal["text"]
    text: str


class Turn(_Body):
    """One turn of a conversation."""

    neutral = {"tool_calls": ([],), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = ""

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

    neutral = {"include_obfuscation": (False,)}

    include_usage: bool = False


class _GenerateBody(_Body):
    """What both kinds of completion take: OpenAI's fields, then ours."""

    neutral = {
        "frequency_penalty": (0, 0.0),
        "presence_penalty": (0, 0.0),
        "logit_bias": ({},),
        "logprobs": (False,),
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (False, True),
        "response_format": ({"type": "text"},),
        "store": (False,),
        "metadata": ({},),
    }

    model: str = DEFAULT_POLICY
    max_tokens: UInt32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Seed | None = None
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
                seed=None if self.seed is None else self.seed % 2**64,
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

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_text(cls, prompt: Any) -> Any:
        return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt

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
