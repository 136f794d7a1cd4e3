"""What is learned from: rollouts for PPO, thumbs and comparisons for the reward model, padded batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


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


class Batch(NamedTuple):
    """Sequences of prompt and response, padded on the right only: causal attention needs no mask then.

    S is the longest prompt plus response, T the longest response.
    """

    tokens: Tensor  # (B, S)
    positions: Tensor  # (B, T + 1): of the states before each response token and after the last
    responses: Tensor  # (B, T)
    mask: Tensor  # (B, T)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(x.to(device) for x in self))


def pad(rows: Sequence[Sequence[int]] | Sequence[Sequence[float]]) -> Tensor:
    """Stack rows of different lengths (B, longest), 0 in the padding."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def collate(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Build one batch from (prompt, response) token ids; no prompt may be empty."""
    lengths = torch.tensor([len(response) for _, response in pairs])
    first = torch.tensor([len(prompt) - 1 for prompt, _ in pairs])
    steps = torch.arange(int(lengths.max()) + 1)
    return Batch(
        tokens=pad([[*prompt, *response] for prompt, response in pairs]),
        positions=first[:, None] + torch.minimum(steps[None], lengths[:, None]),
        responses=pad([response for _, response in pairs]),
        mask=steps[None, :-1] < lengths[:, None],
    )


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield indices in groups of similar length, at most `size` each, longest group first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    yield from (order[start : start + size] for start in range(0, len(order), size))
