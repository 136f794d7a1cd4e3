"""The nouns that cross module borders: plain frozen data, no behaviour beyond properties."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

DEFAULT_POLICY = "default"
BASE_VERSION = 0
IMPORTED_VERSION = -1
"""The version of replies that were imported: none of ours gave them."""
IMPORTED = "imported"
"""Strategy of such a reply, and why PPO may not use it."""
MAX_ID = 256  # characters of a user id, a session id, a subject


class Role(StrEnum):
    """Who said a chat message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class Strategy(StrEnum):
    """How the shown candidate is chosen."""

    NONE = "none"
    BEST_OF_N = "best_of_n"
    SOFT_BEST_OF_N = "soft_best_of_n"
    SPECULATIVE_REJECTION = "speculative_rejection"


class Arm(StrEnum):
    """Which rule made the choice: the strategy, the audit share, or a fallback; or nobody here."""

    STRATEGY = "strategy"
    AUDIT = "audit"
    FALLBACK = "fallback"
    IMPORTED = "imported"


class Extent(StrEnum):
    """Why a request had as many candidates as it had."""

    REQUESTED = "requested"
    """As many as were asked for."""
    ENOUGH = "enough"
    """The first wave was good enough."""
    LOAD = "load"
    """The server was busy."""
    DEADLINE = "deadline"
    """The caller's deadline was near."""
    UNSCORED = "unscored"
    """The first wave got no rewards, and without them more candidates are of no use."""


class Learning(StrEnum):
    """Whether a reply may be learned from."""

    ALLOWED = "allowed"
    EXCLUDED = "excluded"


class FinishReason(StrEnum):
    """Why a candidate ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


class Scope(StrEnum):
    """What a token is for."""

    GENERATE = "generate"
    """Replies."""
    FEEDBACK = "feedback"
    """Thumbs and preferences."""
    ON_BEHALF = "on_behalf"
    """Speaking for users, by naming them."""
    ADMIN = "admin"
    """Versions, and users' data."""
    EXPORT = "export"
    """Taking data out."""


class Status(StrEnum):
    """How an interaction ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


class VersionState(StrEnum):
    """Where a policy version is in its life."""

    PUBLISHED = "published"
    ATTESTED = "attested"
    CANARY = "canary"
    CURRENT = "current"
    RETIRED = "retired"
    REJECTED = "rejected"
    ROLLED_BACK = "rolled_back"


WAITING = (VersionState.PUBLISHED, VersionState.ATTESTED)
"""The states of versions that answer nobody yet, and may."""


@dataclass(frozen=True, slots=True)
class User:
    """A person: the token's subject (empty without authentication) and the caller's user id."""

    subject: str = ""
    user_id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to answer: either a text to continue or a conversation."""

    text: str | None = None
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one candidate is sampled; `temperature` 0 is greedy, `top_k` 0 means all tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def untrainable_reason(self) -> str | None:
        """Return why PPO may not use such samples: the ratio would not be the policy's own."""
        if self.temperature <= 0:
            return "greedy"
        if self.top_p < 1 or self.top_k > 0:
            return "truncated_sampling"
        if self.stop:
            return "stop_strings"
        return None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled response, with what the sampler and the reward model said of it.

    `logprobs` are those of the processed distribution the sampler drew from, one per token.
    `reward` is the logit of a thumb up, None when not scored; `reward_components` are its parts by
    name, where it has several. `stage_rewards` are those of its first tokens, one for each checkpoint
    of a pruning strategy. `propensity` is the marginal probability with which guidance would have
    shown it, None when no such claim can be made.
    """

    index: int
    policy_version: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    reward: float | None = None
    propensity: float | None = None
    chosen: bool = False
    stage_rewards: tuple[float, ...] = ()
    reward_components: Mapping[str, float] = field(default_factory=dict)


def promise_of(reward: float | None, components: Mapping[str, float]) -> float | None:
    """Return the part of a reward that is the logit of a thumb up: all of it, where it has no parts."""
    return components.get("thumbs") if components else reward


@dataclass(frozen=True, slots=True)
class Interaction:
    """A request as it was answered: the row behind a reply. Times are unix seconds, UTC.

    `strategy` is a Strategy, or the name of one that the server has beyond those. `request_digest` tells
    the body of a request with a `request_id` from others; it is empty where no retry may return this row.
    `duration_s` is how long the engine's part took, None where it was not measured.
    """

    response_id: str
    policy: str
    policy_version: int
    user: User
    session_id: str
    request_id: str
    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    strategy: str
    arm: Arm
    reranked: bool
    extent: Extent
    learning: Learning
    status: Status
    trainable: bool
    untrainable_reason: str | None
    policy_digest: str
    reward_digest: str
    created_at: float
    candidates: tuple[Candidate, ...]
    request_digest: str = ""
    duration_s: float | None = None
    pinned: bool = False
    """The caller named the version."""
    shows_candidates: bool = True
    """The caller got all candidates to read, not only the chosen one."""

    @property
    def chosen(self) -> Candidate:
        """Return the candidate that was shown."""
        return next(c for c in self.candidates if c.chosen)


@dataclass(frozen=True, slots=True)
class Feedback:
    """A thumb as it is stored: `value` 1 is up, 0 is down."""

    feedback_id: int
    response_id: str
    policy_version: int
    value: int
    user: User
    created_at: float
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class RatedReply:
    """The effective thumb of a reply beside the reply itself: one example for the reward model.

    `is_new`: no ancestor learned this value of this reply.
    """

    feedback_id: int
    response_id: str
    value: int
    created_at: float
    is_new: bool
    user: User
    policy_version: int
    learning: Learning
    status: Status
    arm: Arm
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    candidate: Candidate


@dataclass(frozen=True, slots=True)
class Preference:
    """A preference as it is stored: of two candidates, by index, one was better."""

    preference_id: int
    response_id: str
    policy_version: int
    better: int
    worse: int
    user: User
    created_at: float
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class ComparedReply:
    """An effective preference beside the candidates it is about; `is_new`: see RatedReply."""

    preference_id: int
    response_id: str
    created_at: float
    is_new: bool
    user: User
    policy_version: int
    learning: Learning
    status: Status
    prompt_token_ids: tuple[int, ...]
    better: Candidate
    worse: Candidate


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """What the trainer published, and what the server made of it. Times are unix seconds, UTC."""

    policy: str
    version: int
    parent: int | None
    folder: str
    policy_digest: str
    reward_digest: str
    manifest_digest: str
    published_at: float
    round_id: str | None = None
    feedback_count: int = 0
    first_feedback_id: int = 0
    last_feedback_id: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: VersionState = VersionState.PUBLISHED
    state_since: float = 0.0
    reason: str = ""
    is_tainted: bool = False
    """It, or an ancestor, learned from a user's data that was erased since."""
    collected_at: float | None = None
    """When its folder was deleted; None while it is there."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of the trainer: what it read and what came of it. Times are unix seconds, UTC."""

    round_id: str
    policy: str
    parent: int
    started_at: float
    finished_at: float
    version: int | None
    reason: str
    metrics: Mapping[str, Any]
    new_feedback: tuple[int, ...] = ()
    replayed_feedback: tuple[int, ...] = ()
    new_preferences: tuple[int, ...] = ()
    replayed_preferences: tuple[int, ...] = ()
    rollouts: tuple[str, ...] = ()
