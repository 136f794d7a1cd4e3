"""What clients send, as protocol buffers. Needs neither torch nor vllm."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from thumbloop.types import Message, Prompt, Role, Strategy
from thumbloop.v1 import admin_pb2, feedback_pb2, policy_pb2

ROLES = {
    Role.SYSTEM: policy_pb2.ROLE_SYSTEM,
    Role.USER: policy_pb2.ROLE_USER,
    Role.ASSISTANT: policy_pb2.ROLE_ASSISTANT,
}


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to answer; what is None or empty is left to the server.

    `strategy` is a Strategy, or the name of one that the server has beyond those.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    strategy: Strategy | str | None = None
    guidance_temperature: float | None = None
    num_candidates: int | None = None
    policy_version: int | None = None
    is_excluded: bool = False
    include_candidates: bool = False


class CallOptions(TypedDict, total=False):
    """What a call for a reply may say beside the prompt."""

    is_text: bool
    """A string is a text to continue, as models without a chat template need it."""
    user_id: str
    session_id: str
    request_id: str
    """Names the request, which is answered once however often it is sent; a new one by default."""
    options: GenerateOptions
    timeout_s: float | None
    """Instead of the client's own."""


class PreferOptions(TypedDict, total=False):
    """What feedback may say beside its value."""

    user_id: str
    request_id: str
    """Names the feedback, which counts once however often it is sent; a new one by default."""
    timeout_s: float | None


class RateOptions(PreferOptions, total=False):
    """What a thumb may say beside its value."""

    comment: str


def prompt_of(prompt: str | Sequence[Message], *, is_text: bool) -> Prompt:
    """Return a conversation; a string is a user's only turn, or with `is_text` a text to continue."""
    if not isinstance(prompt, str):
        return Prompt(messages=tuple(prompt))
    return Prompt(text=prompt) if is_text else Prompt(messages=(Message(Role.USER, prompt),))


def generate_request(prompt: Prompt, options: GenerateOptions) -> policy_pb2.GenerateRequest:
    """Return the wire message of a prompt."""
    turns = [policy_pb2.ChatMessage(role=ROLES[m.role], content=m.content) for m in prompt.messages]
    request = policy_pb2.GenerateRequest(
        sampling=policy_pb2.SamplingParams(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
            stop=options.stop,
        ),
        guidance=policy_pb2.GuidanceParams(
            num_candidates=options.num_candidates,
            temperature=options.guidance_temperature,
        ),
        policy_version=options.policy_version,
        include_candidates=options.include_candidates,
    )
    if prompt.text is None:
        request.chat.messages.extend(turns)
    else:
        request.text = prompt.text
    if isinstance(options.strategy, Strategy):
        name = f"GUIDANCE_STRATEGY_{options.strategy.name}"
        request.guidance.strategy = policy_pb2.GuidanceStrategy.Value(name)
    elif options.strategy is not None:
        request.guidance.strategy_name = options.strategy
    if options.is_excluded:
        request.learning = policy_pb2.LEARNING_EXCLUDED
    return request


def call_message(prompt: str | Sequence[Message], how: CallOptions) -> policy_pb2.GenerateRequest:
    """Return the wire message of a call for a reply."""
    request = generate_request(
        prompt_of(prompt, is_text=how.get("is_text", False)),
        how.get("options", GenerateOptions()),
    )
    request.user_id = how.get("user_id", "")
    request.session_id = how.get("session_id", "")
    request.request_id = how.get("request_id") or uuid.uuid4().hex
    return request


def thumb_message(
    response_id: str, up: bool, how: RateOptions
) -> feedback_pb2.SubmitFeedbackRequest:
    """Return the wire message of a thumb."""
    return feedback_pb2.SubmitFeedbackRequest(
        response_id=response_id,
        thumb=feedback_pb2.THUMB_UP if up else feedback_pb2.THUMB_DOWN,
        user_id=how.get("user_id", ""),
        comment=how.get("comment", ""),
        request_id=how.get("request_id") or uuid.uuid4().hex,
    )


def preference_message(
    response_id: str, better: int, worse: int, how: PreferOptions
) -> feedback_pb2.SubmitPreferenceRequest:
    """Return the wire message of a preference."""
    return feedback_pb2.SubmitPreferenceRequest(
        response_id=response_id,
        better_index=better,
        worse_index=worse,
        user_id=how.get("user_id", ""),
        request_id=how.get("request_id") or uuid.uuid4().hex,
    )


def erasure_message(user_id: str, subject: str | None) -> feedback_pb2.DeleteUserDataRequest:
    """Return the wire message that has a user forgotten."""
    return feedback_pb2.DeleteUserDataRequest(user_id=user_id, subject=subject)


def promotion_message(
    version: int, expected_current: int, reason: str
) -> admin_pb2.PromotePolicyVersionRequest:
    """Return the wire message of a promotion."""
    return admin_pb2.PromotePolicyVersionRequest(
        policy_version=version, expected_current_version=expected_current, reason=reason
    )


def rollback_message(
    version: int | None, expected_current: int, reason: str
) -> admin_pb2.RollbackPolicyVersionRequest:
    """Return the wire message of a rollback."""
    return admin_pb2.RollbackPolicyVersionRequest(
        policy_version=version, expected_current_version=expected_current, reason=reason
    )
