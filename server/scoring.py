"""Candidates -> rewards. A reward is the logit of a thumb up, so sigmoid(reward) is its probability.

A reward may be a mixture of several, by weight: the thumbs' own reward model and, for instance, a length
that is wanted or a classifier of safety. Each part is logged by name.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from server.concurrency import gather_or_cancel
from server.engine import REPLY_PRIORITY, Adapter, Engine
from server.reading import Reading
from thumbloop.rendering import VerdictTokens
from thumbloop.rewards import format_reward, length_reward

FORGED_REWARD = -100.0
"""Of a response that holds a verdict token, whatever else is said of it."""
_FORGED = -math.inf  # what no model says


class Scorer(Protocol):
    """Whatever turns a prompt and a response into a reward."""

    def can_score(self, adapter: Adapter | None) -> bool:
        """Say whether it has an opinion for a version with this reward adapter; None: without any."""

    async def score(self, reading: Reading, adapter: Adapter | None, priority: int, /) -> float:
        """Return the response's reward under a version's reward adapter.

        `priority` is the engine's, for those that ask it.
        """


class VerdictScorer:
    """Asks the policy's own trunk, under the reward adapter, for its verdict.

    reward = logprob(up) - logprob(down) of the two verdict tokens after the verdict prompt.
    """

    def __init__(self, engine: Engine, verdict: VerdictTokens) -> None:
        self._engine = engine
        self._verdict = verdict

    def can_score(self, adapter: Adapter | None) -> bool:
        """Say whether the version has learned from thumbs; the base model has not."""
        return adapter is not None

    async def score(
        self, reading: Reading, adapter: Adapter | None, priority: int = REPLY_PRIORITY
    ) -> float:
        """Return the reward; see Scorer. Raises EngineUnavailable, Overloaded."""
        if self._verdict.is_forged_in(reading.token_ids):
            return _FORGED
        prompt = self._verdict.wrap(reading.prompt_token_ids, reading.token_ids)
        answers = (self._verdict.up, self._verdict.down)
        up, down = await self._engine.next_logprobs(prompt, answers, adapter, priority=priority)
        return up - down


class LengthScorer:
    """Wants replies of a length: minus the distance from it, in units of `scale_tokens`."""

    def __init__(self, target_tokens: int, scale_tokens: float) -> None:
        self._target = target_tokens
        self._scale = scale_tokens

    def can_score(self, _adapter: Adapter | None) -> bool:
        """Always."""
        return True

    async def score(
        self, reading: Reading, _adapter: Adapter | None, _priority: int = REPLY_PRIORITY
    ) -> float:
        """Return the reward, at most 0; see Scorer."""
        return length_reward(
            len(reading.token_ids), target_tokens=self._target, scale_tokens=self._scale
        )


class FormatScorer:
    """Wants replies of a form: that of a regular expression."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern

    def can_score(self, _adapter: Adapter | None) -> bool:
        """Always."""
        return True

    async def score(
        self, reading: Reading, _adapter: Adapter | None, _priority: int = REPLY_PRIORITY
    ) -> float:
        """Return the reward, at most 0; see Scorer."""
        return format_reward(reading.text, self._pattern)


class Score(NamedTuple):
    """A reward, and its parts by name before weighting; no parts where it is that of thumbs alone."""

    reward: float
    components: Mapping[str, float]


class Weighted(NamedTuple):
    """A scorer and its share of the reward."""

    weight: float
    scorer: Scorer


class Mixture:
    """The weighted sum of named scorers; one that has no opinion is left out."""

    def __init__(self, components: Mapping[str, Weighted]) -> None:
        self._components = components

    def can_score(self, adapter: Adapter | None) -> bool:
        """Say whether any component has an opinion."""
        return any(part.scorer.can_score(adapter) for part in self._components.values())

    async def score(
        self, reading: Reading, adapter: Adapter | None, priority: int = REPLY_PRIORITY
    ) -> Score:
        """Return the mixed reward; that of a response that forges a verdict is FORGED_REWARD."""
        asked = {n: p for n, p in self._components.items() if p.scorer.can_score(adapter)}
        rewards = await gather_or_cancel(
            part.scorer.score(reading, adapter, priority) for part in asked.values()
        )
        is_forged = _FORGED in rewards
        parts = {
            name: FORGED_REWARD if reward == _FORGED else reward
            for name, reward in zip(asked, rewards, strict=True)
        }
        reward = sum(asked[name].weight * part for name, part in parts.items())
        if is_forged:
            reward = FORGED_REWARD
        return Score(reward, {} if self._components.keys() == {"thumbs"} else parts)
