"""How good a version is: held-out prompts, version pinned, never learned from, judged without noise."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from demo.ledger import Ledger
from demo.preferences import Preference
from demo.speaker import Speaker
from thumbloop.client import GenerateOptions
from thumbloop.errors import ThumbloopError
from thumbloop.types import Strategy

_AT_ONCE = 16
_GUIDED = 200
"""Prompts that are asked with guidance, at most: each takes four candidates."""
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a version does on held-out prompts. `interval` is Wilson's, 95 %."""

    thumb_up_rate: float
    interval: tuple[float, float]
    mean_reply_tokens: float
    well_formed_share: float | None


class Examiner:
    """Asks the same held-out prompts of every version."""

    def __init__(
        self,
        client: Speaker,
        prompts: Sequence[str],
        preference: Preference,
        is_well_formed: Callable[[str], bool] | None,
        ledger: Ledger,
    ) -> None:
        self._client = client
        self._prompts = prompts
        self._preference = preference
        self._is_well_formed = is_well_formed
        self._ledger = ledger

    async def policy(self, version: int) -> Evaluation | None:
        """Evaluate the policy itself: one sample, no guidance. None: a request failed."""
        return await self._evaluate(version, self._prompts, Strategy.NONE, 1)

    async def guided(self, version: int) -> Evaluation | None:
        """Evaluate what users see, soft best-of-4, on the first of the prompts. None: a request failed."""
        prompts = self._prompts[:_GUIDED]
        return await self._evaluate(version, prompts, Strategy.SOFT_BEST_OF_N, 4)

    async def _evaluate(
        self, version: int, prompts: Sequence[str], strategy: Strategy, n: int
    ) -> Evaluation | None:
        at_once = asyncio.Semaphore(_AT_ONCE)
        options = GenerateOptions(
            policy_version=version, strategy=strategy, num_candidates=n, is_excluded=True
        )

        async def ask(prompt: str) -> tuple[str, int] | None:
            try:
                async with at_once:
                    reply = await self._client.generate(prompt, user_id="examiner", options=options)
            except ThumbloopError as error:
                self._ledger.fail(error)
                return None
            assert reply.policy_version == version, "a pinned request was answered by another"
            self._ledger.evaluated.add(reply.response_id)
            return reply.text, reply.usage.reply_tokens

        asked = await asyncio.gather(*(ask(prompt) for prompt in prompts))
        answers = [answer for answer in asked if answer is not None]
        if len(answers) < len(asked):
            return None
        replies, tokens = zip(*answers, strict=True)
        return self._result(prompts, replies, tokens)

    def _result(
        self, prompts: Sequence[str], replies: Sequence[str], tokens: Sequence[int]
    ) -> Evaluation:
        n = len(replies)
        liked = sum(self._preference(p, r) for p, r in zip(prompts, replies, strict=True))
        interval = binomtest(round(liked), n).proportion_ci(_CONFIDENCE, method="wilson")
        formed = self._is_well_formed
        return Evaluation(
            thumb_up_rate=liked / n,
            interval=(float(interval.low), float(interval.high)),
            mean_reply_tokens=sum(tokens) / n,
            well_formed_share=sum(map(formed, replies)) / n if formed else None,
        )
