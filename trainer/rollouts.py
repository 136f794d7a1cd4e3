"""What is learned from: rollouts for PPO, thumbs and comparisons for the reward model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled candidate: what the policy saw, said and how likely the sampler found it.

    `is_finished` is False for a truncated candidate, whose score is unknown; `has_eos` is False for
    one that reached its token limit. `propensity`: how likely guidance was to show it, None where no claim
    about that can be made. `components` are rewards that the server logged by name, `reward` the thumbs'
    part of them, None where there was none.
    """

    response_id: str
    policy_version: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    logprobs: tuple[float, ...]
    temperature: float
    is_finished: bool = True
    has_eos: bool = True
    user: str = ""
    reward: float | None = None
    propensity: float | None = None
    components: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Thumb:
    """One rated reply; `propensity` is None where no claim about the choice can be made.

    `is_seen`: the parent's reward model was fitted on this reply, whatever was said of it then.
    `sample` is the reply as its policy sampled it, None where it is no plain sample of it.
    """

    feedback_id: int
    response_id: str
    user: str
    is_up: bool
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    propensity: float | None = None
    is_seen: bool = False
    policy_version: int = 0
    sample: Rollout | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two candidates of one prompt, of which a user found one better; `is_seen`: see Thumb."""

    preference_id: int
    response_id: str
    user: str
    prompt: tuple[int, ...]
    better: tuple[int, ...]
    worse: tuple[int, ...]
    is_seen: bool = False
    policy_version: int = 0


Judgement = Thumb | Comparison


def unrated(judgements: Sequence[Judgement]) -> list[Comparison]:
    """Return the comparisons of replies without a thumb: beside one they are the same opinion once more."""
    rated = {j.response_id for j in judgements if isinstance(j, Thumb)}
    return [j for j in judgements if isinstance(j, Comparison) and j.response_id not in rated]
