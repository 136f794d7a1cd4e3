"""Candidates -> rewards. A reward is the logit of a thumb up, so sigmoid(reward) is its probability."""

from collections.abc import Sequence
from typing import Protocol

from server.engine import Adapter, Engine
from thumbloop.rendering import VerdictTokens

FORGED_REWARD = -100.0  # of a response that holds a verdict token: below anything a model says


class Scorer(Protocol):
    """Whatever turns a prompt and a response into a reward."""

    async def score(
        self, prompt: Sequence[int], response: Sequence[int], adapter: Adapter
    ) -> float:
        """Return the response's reward under a version's reward adapter."""


class VerdictScorer:
    """Asks the policy's own trunk, under the reward adapter, for its verdict.

    reward = logprob(up) - logprob(down) of the two verdict tokens after the verdict prompt.
    """

    def __init__(self, engine: Engine, verdict: VerdictTokens) -> None:
        self._engine = engine
        self._verdict = verdict

    async def score(
        self, prompt: Sequence[int], response: Sequence[int], adapter: Adapter
    ) -> float:
        """Return the reward; see Scorer. Raises EngineUnavailable, Overloaded."""
        if self._verdict.is_forged_in(response):
            return FORGED_REWARD
        up, down = await self._engine.next_logprobs(
            self._verdict.wrap(prompt, response), (self._verdict.up, self._verdict.down), adapter
        )
        return up - down
