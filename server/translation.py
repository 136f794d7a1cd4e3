"""Protocol buffers -> types: what callers sent, checked field by field."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from server.guidance import Choice
from server.guidance import Guidance as Strategist
from server.pipeline import Request
from server.violations import Violations
from thumbloop.config.server import Guidance, Limits, SamplingDefaults
from thumbloop.errors import UnknownPolicy, clipped
from thumbloop.types import (
    DEFAULT_POLICY,
    MAX_ID,
    Learning,
    Message,
    Prompt,
    Role,
    Sampling,
    Strategy,
    User,
)
from thumbloop.v1 import admin_pb2, feedback_pb2, policy_pb2

MAX_REQUEST_ID = 128
MAX_COMMENT = 4096
MAX_STOP = 128
MAX_STRATEGY = 32

_SHOWN = 64  # bytes of a name that a refusal repeats
_ROLES = {
    policy_pb2.ROLE_SYSTEM: Role.SYSTEM,
    policy_pb2.ROLE_USER: Role.USER,
    policy_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
}
_STRATEGIES = {
    policy_pb2.GUIDANCE_STRATEGY_NONE: Strategy.NONE,
    policy_pb2.GUIDANCE_STRATEGY_BEST_OF_N: Strategy.BEST_OF_N,
    policy_pb2.GUIDANCE_STRATEGY_SOFT_BEST_OF_N: Strategy.SOFT_BEST_OF_N,
    policy_pb2.GUIDANCE_STRATEGY_SPECULATIVE_REJECTION: Strategy.SPECULATIVE_REJECTION,
}
THUMBS = {feedback_pb2.THUMB_UP: 1, feedback_pb2.THUMB_DOWN: 0}


class Defaults(NamedTuple):
    """What a request gets where it says nothing, and how far it may go."""

    sampling: SamplingDefaults
    guidance: Guidance
    limits: Limits
    strategies: Mapping[str, Strategist]


def check_policy(name: str) -> str:
    """Return the policy's name. Raises UnknownPolicy."""
    if name not in ("", DEFAULT_POLICY):
        raise UnknownPolicy(f"there is no policy of this name; served: {DEFAULT_POLICY}")
    return DEFAULT_POLICY


def request_of(
    message: policy_pb2.GenerateRequest, defaults: Defaults, user: User, *, time_left_s: float
) -> Request:
    """Return the user's request, complete with defaults; an answer is wanted within `time_left_s`.

    Raises InvalidRequest with every violation. UnknownPolicy.
    """
    check_policy(message.policy)
    wrong = Violations()
    prompt = prompt_of(message, defaults.limits, wrong)
    sampling = _sampling_of(message.sampling, defaults, wrong)
    strategist, choice = _guidance_of(message.guidance, defaults, wrong)
    wrong.storable(message.user_id, MAX_ID, "user_id")
    wrong.storable(message.session_id, MAX_ID, "session_id")
    wrong.storable(message.request_id, MAX_REQUEST_ID, "request_id")
    wrong.expect(message.learning in (0, 1, 2), "learning", "is none of the known values")
    wrong.expect(message.priority in (0, 1, 2), "priority", "is none of the known values")
    pinned = message.policy_version if message.HasField("policy_version") else None
    wrong.expect(pinned is None or pinned >= 0, "policy_version", "is negative")
    wrong.raise_if_any()
    limit = max(time_left_s - defaults.guidance.deadline_margin_s, 0.0)
    choice = replace(choice, time_limit_s=limit)
    excluded = message.learning == policy_pb2.LEARNING_EXCLUDED
    return Request(
        prompt=prompt,
        sampling=sampling,
        guidance=strategist,
        choice=choice,
        user=user,
        session_id=message.session_id,
        request_id=message.request_id,
        learning=Learning.EXCLUDED if excluded else Learning.ALLOWED,
        is_background=message.priority == policy_pb2.PRIORITY_BACKGROUND,
        policy_version=pinned,
        shows_candidates=message.include_candidates,
    )


def prompt_of(
    message: policy_pb2.GenerateRequest | admin_pb2.ImportedFeedback,
    limits: Limits,
    wrong: Violations,
) -> Prompt:
    """Return what is to be answered, or was; note what is wrong with it."""
    kind = message.WhichOneof("prompt")
    wrong.expect(kind is not None, "prompt", "is missing; set `text` or `chat`")
    if kind != "chat":
        wrong.expect(kind is None or bool(message.text.strip()), "text", "is empty")
        wrong.no_longer(message.text, limits.max_prompt_characters, "text")
        return Prompt(text=message.text)
    messages = message.chat.messages
    wrong.expect(len(messages) > 0, "chat.messages", "is empty")
    for i, turn in enumerate(messages):
        wrong.expect(turn.role in _ROLES, f"chat.messages[{i}].role", "is missing or unknown")
        is_reply = turn.role == policy_pb2.ROLE_ASSISTANT  # some end at once, without a word
        is_said = is_reply or bool(turn.content.strip())
        wrong.expect(is_said, f"chat.messages[{i}].content", "is empty")
    if messages and messages[-1].role in _ROLES:
        is_users = messages[-1].role == policy_pb2.ROLE_USER
        wrong.expect(is_users, f"chat.messages[{len(messages) - 1}].role", "has to be a user's")
    total = sum(len(turn.content) for turn in messages)
    wrong.expect(
        total <= limits.max_prompt_characters,
        "chat.messages",
        f"have {total} characters, at most {limits.max_prompt_characters} allowed",
    )
    return Prompt(
        messages=tuple(
            Message(_ROLES[turn.role], turn.content) for turn in messages if turn.role in _ROLES
        )
    )


def _sampling_of(
    message: policy_pb2.SamplingParams, defaults: Defaults, wrong: Violations
) -> Sampling:
    standard, limits = defaults.sampling, defaults.limits
    max_tokens = _given(message, "max_tokens", standard.max_tokens)
    temperature = _given(message, "temperature", standard.temperature)
    top_p = _given(message, "top_p", standard.top_p)
    top_k = _given(message, "top_k", standard.top_k)
    stop = tuple(message.stop)
    wrong.expect(
        1 <= max_tokens <= limits.max_tokens,
        "sampling.max_tokens",
        f"has to be in [1, {limits.max_tokens}]",
    )
    wrong.expect(
        temperature == 0 or 0.01 <= temperature <= 2,
        "sampling.temperature",
        "has to be 0 (greedy) or a number in [0.01, 2]",
    )
    wrong.expect(0 < top_p <= 1, "sampling.top_p", "has to be a number in (0, 1]")
    wrong.expect(top_k <= 1_000_000, "sampling.top_k", "has to be in [0, 1000000]")
    wrong.expect(len(stop) <= limits.max_stop, "sampling.stop", f"at most {limits.max_stop} texts")
    for i, text in enumerate(stop):
        in_range = 1 <= len(text) <= MAX_STOP
        wrong.expect(in_range, f"sampling.stop[{i}]", f"has to have 1 to {MAX_STOP} characters")
    seed = message.seed if message.HasField("seed") else None
    return Sampling(max_tokens, temperature, top_p, top_k, seed, stop)


def _guidance_of(
    message: policy_pb2.GuidanceParams, defaults: Defaults, wrong: Violations
) -> tuple[Strategist, Choice]:
    standard, most = defaults.guidance, defaults.limits.max_candidates
    n = _given(message, "num_candidates", standard.num_candidates)
    temperature = _given(message, "temperature", standard.temperature)
    wrong.expect(1 <= n <= most, "guidance.num_candidates", f"has to be in [1, {most}]")
    wrong.expect(0 < temperature <= 100, "guidance.temperature", "has to be a number in (0, 100]")
    strategy = _strategy_of(message, standard.strategy, wrong)
    known = strategy in defaults.strategies
    served = ", ".join(sorted(defaults.strategies))
    field = "guidance.strategy_name" if message.strategy_name else "guidance.strategy"
    wrong.expect(known, field, f"{clipped(strategy, _SHOWN)} is not served here; served: {served}")
    strategist = defaults.strategies[strategy if known else standard.strategy]
    if strategist.name == Strategy.NONE:
        n = 1
    return strategist, Choice(n, temperature, standard.audit_share)


def _strategy_of(message: policy_pb2.GuidanceParams, standard: str, wrong: Violations) -> str:
    """Return the name of the strategy that a request wants."""
    if message.strategy_name:
        name = message.strategy_name
        wrong.storable(name, MAX_STRATEGY, "guidance.strategy_name")
        is_alone = not message.strategy
        wrong.expect(is_alone, "guidance.strategy", "excludes guidance.strategy_name; set one")
        return name
    if not message.strategy:
        return standard
    is_known = message.strategy in _STRATEGIES
    wrong.expect(is_known, "guidance.strategy", "is none of the known values")
    return _STRATEGIES[message.strategy] if is_known else standard


def _given(message: Any, field: str, default: Any) -> Any:
    """Return an optional field's value, or the default when it is absent."""
    return getattr(message, field) if message.HasField(field) else default


def _of_feedback(
    message: feedback_pb2.SubmitFeedbackRequest | feedback_pb2.SubmitPreferenceRequest,
) -> Violations:
    """Return what is wrong with the part that all feedback has in common."""
    wrong = Violations()
    wrong.expect(bool(message.response_id), "response_id", "is missing")
    wrong.storable(message.response_id, MAX_ID, "response_id")
    wrong.storable(message.user_id, MAX_ID, "user_id")
    wrong.storable(message.request_id, MAX_REQUEST_ID, "request_id")
    return wrong


class GivenThumb(NamedTuple):
    """A thumb as a caller sent it: 1 up, 0 down."""

    response_id: str
    value: int
    user: User
    comment: str
    request_id: str


def thumb_of(message: feedback_pb2.SubmitFeedbackRequest, user: User) -> GivenThumb:
    """Return the user's thumb. Raises InvalidRequest."""
    wrong = _of_feedback(message)
    wrong.expect(message.thumb in THUMBS, "thumb", "has to be THUMB_UP or THUMB_DOWN")
    wrong.storable(message.comment, MAX_COMMENT, "comment")
    wrong.raise_if_any()
    return GivenThumb(
        message.response_id,
        THUMBS[message.thumb],
        user,
        message.comment,
        message.request_id,
    )


class GivenPreference(NamedTuple):
    """A preference as a caller sent it: candidates by index."""

    response_id: str
    better: int
    worse: int
    user: User
    request_id: str


def preference_of(message: feedback_pb2.SubmitPreferenceRequest, user: User) -> GivenPreference:
    """Return the user's preference. Raises InvalidRequest."""
    wrong = _of_feedback(message)
    is_another = message.better_index != message.worse_index
    wrong.expect(is_another, "worse_index", "has to be another candidate than better_index")
    wrong.raise_if_any()
    return GivenPreference(
        message.response_id, message.better_index, message.worse_index, user, message.request_id
    )
