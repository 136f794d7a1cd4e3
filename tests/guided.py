"""A worker for strategies whose candidates are written down: how long they are, and what they earn."""

import asyncio
from collections.abc import Callable, Sequence

from server.guidance import NotScored
from tests.rows import candidate
from thumbloop.types import Candidate, FinishReason

Earned = float | None | Callable[[int], float]
"""What a candidate earns: a reward, None where it cannot be scored, or a function of its tokens."""


class ScriptedWorker:
    """Samples what it was told; `slow` candidates are not finished before `release` is set."""

    def __init__(
        self,
        earned: Sequence[Earned],
        *,
        can_score: bool = True,
        tokens: Sequence[int] | int = 4,
        slow: Sequence[int] = (),
        logprob: Callable[[int], float] = lambda _index: -1.0,
    ) -> None:
        self.can_score = can_score
        self.sampled: list[int] = []
        self.scored: list[tuple[int, int]] = []  # (index, tokens)
        self.aborted: list[int] = []
        self.shown: list[int] = []
        self.urgent: list[int] = []
        self.urgently_scored: list[int] = []
        self.decoded: dict[int, int] = {}
        self.release = asyncio.Event()
        self.problem = "full"
        self.tokens = [tokens] * len(earned) if isinstance(tokens, int) else list(tokens)
        self._earned = earned
        self._slow = set(slow)
        self._logprob = logprob

    async def sample(self, index: int, *, is_urgent: bool = True) -> Candidate:
        self.sampled.append(index)
        if is_urgent:
            self.urgent.append(index)
        if index in self._slow:
            await self.release.wait()
        return self.part(index, self.tokens[index])

    def begin(self, index: int) -> "ScriptedDecoding":
        self.sampled.append(index)
        return ScriptedDecoding(self, index)

    def show(self, index: int) -> None:
        self.shown.append(index)

    async def score(self, given: Candidate, *, is_urgent: bool = True) -> Candidate:
        count = len(given.token_ids)
        if is_urgent:
            self.urgently_scored.append(given.index)
        self.scored.append((given.index, count))
        earned = self._earned[given.index]
        if earned is None:
            raise NotScored(self.problem)
        reward = earned(count) if callable(earned) else earned
        changes = {"reward": reward, "finish_reason": given.finish_reason}
        return candidate(given.index, **(_fields(given) | changes))

    def part(self, index: int, count: int) -> Candidate:
        """Return the first `count` tokens of a candidate."""
        is_whole = count >= self.tokens[index]
        self.decoded[index] = max(self.decoded.get(index, 0), count)
        return candidate(
            index,
            chosen=False,
            reward=None,
            propensity=None,
            token_ids=tuple(range(count)),
            logprobs=(self._logprob(index),) * count,
            finish_reason=FinishReason.STOP if is_whole else FinishReason.ABORTED,
        )

    def is_slow(self, index: int) -> bool:
        return index in self._slow


class ScriptedDecoding:
    """One candidate that has as many tokens as anybody waits for."""

    def __init__(self, worker: ScriptedWorker, index: int) -> None:
        self._worker = worker
        self._index = index
        self._count = 0

    async def until(self, tokens: int) -> Candidate:
        if self._worker.is_slow(self._index):
            await self._worker.release.wait()
        self._count = min(tokens, self._worker.tokens[self._index])
        return self._worker.part(self._index, self._count)

    async def finish(self) -> Candidate:
        return await self.until(self._worker.tokens[self._index])

    async def abort(self) -> Candidate:
        self._worker.aborted.append(self._index)
        return self._worker.part(self._index, self._count)


def _fields(given: Candidate) -> dict[str, object]:
    return {
        "token_ids": given.token_ids,
        "logprobs": given.logprobs,
        "chosen": given.chosen,
        "propensity": given.propensity,
    }
