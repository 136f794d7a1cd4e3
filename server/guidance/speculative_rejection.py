"""Speculative rejection: partial texts are scored while decoding goes on, and the worst are aborted.

After Sun et al. 2024 (arXiv 2410.20290), adapted: nothing is stopped and resumed, and the audit share,
decided before sampling, is never pruned, so that what a partial score is worth can be measured. At a
checkpoint every candidate is scored on its first tokens; the best of them go on. The best of the
finished ones is shown. Given the rewards the choice is certain: what was pruned or lost has a
propensity of a / n, the winner one of a / n + 1 - a.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from random import Random
from typing import Any

from server.concurrency import end_all, gather_or_cancel
from server.guidance.best_of_n import BestOfN
from server.guidance.fallback import most_likely
from server.guidance.outcome import (
    Checkpoint,
    Choice,
    Decoding,
    NotScored,
    Outcome,
    Worker,
    draw_arm,
    marginal_propensities,
    settle,
)
from server.guidance.pool import draw
from thumbloop.errors import ThumbloopError
from thumbloop.types import Arm, Candidate, Extent, FinishReason, Strategy


class SpeculativeRejection:
    """Starts n, looks at checkpoints, aborts the losers, takes the best of the rest."""

    name = Strategy.SPECULATIVE_REJECTION

    async def run(self, worker: Worker, choice: Choice, rng: Random) -> Outcome:
        """Return all n candidates, aborted ones included, with the winner marked."""
        if not choice.checkpoints or not worker.can_score or choice.num_candidates == 1:
            return await BestOfN().run(worker, choice, rng)
        arm = draw_arm(choice.audit_share, rng)
        prunes = arm is Arm.STRATEGY and any(c.prunes for c in choice.checkpoints)
        # Also where nobody was pruned: that says that all were short.
        selected = "pruned" if prunes else ""
        race = Race(worker, choice)
        try:
            async with asyncio.timeout(choice.time_limit_s):
                try:
                    candidates = await race.run(prunes=prunes)
                except NotScored as error:
                    return most_likely(await race.finish_all(), error.reason, selected=selected)
        except TimeoutError:
            cut = await race.first_finished()
            return most_likely(cut, "deadline", extent=Extent.DEADLINE, selected="cut")
        finally:
            await race.stop()
        weights = race_weights(candidates, choice.checkpoints)
        return settle(
            candidates,
            draw(weights, arm, rng),
            marginal_propensities(weights, choice.audit_share, choice.num_candidates),
            arm=arm,
            reranked=True,
            selected=selected,
        )


class Race:
    """The candidates of one request on their way: looked at, aborted or finished."""

    def __init__(self, worker: Worker, choice: Choice) -> None:
        self._worker = worker
        self._checkpoints = choice.checkpoints
        self._decodings: list[Decoding] = [worker.begin(i) for i in range(choice.num_candidates)]
        self._indices = range(choice.num_candidates)
        self._stages: list[tuple[float, ...]] = [() for _ in self._decodings]
        self._ended: dict[int, Candidate] = {}

    async def run(self, *, prunes: bool) -> list[Candidate]:
        """Let the candidates run, aborting losers where that is wanted; return all of them."""
        alive = list(self._indices)
        for number, checkpoint in enumerate(self._checkpoints):
            await gather_or_cancel(self._look(i, checkpoint.tokens) for i in alive)
            if prunes and checkpoint.prunes:
                kept = survivors(
                    self._standing(alive, number), self._running(alive), checkpoint.keep
                )
                await gather_or_cancel(self._abort(i) for i in set(alive) - kept)
                alive = sorted(kept)
                if len(alive) == 1:
                    self._worker.show(alive[0])
        await gather_or_cancel(self._finish(i) for i in alive)
        return self._all()

    async def stop(self) -> list[Candidate]:
        """Abort what still runs; return all candidates as far as they got."""
        aborting = gather_or_cancel(self._abort(i) for i in self._running(self._indices))
        await asyncio.shield(aborting)  # a caller that is cancelled once more leaves none behind
        return self._all()

    async def first_finished(self) -> list[Candidate]:
        """Wait until one candidate has finished, if none has; abort the others and return all.

        Raises what ended them where all failed.
        """
        if all(c.finish_reason is FinishReason.ABORTED for c in self._ended.values()):
            running = self._running(self._indices)
            await _first_success([self._decodings[i].finish() for i in running])
        return await self.stop()

    async def finish_all(self) -> list[Candidate]:
        """Let what still runs finish unscored; return all candidates."""

        async def finish(index: int) -> None:
            self._end(index, await self._decodings[index].finish())

        await gather_or_cancel(finish(i) for i in self._running(self._indices))
        return self._all()

    async def _look(self, index: int, tokens: int) -> None:
        """Score a candidate on its first tokens, for good if it ended before."""
        if index in self._ended:
            return
        partial = await self._decodings[index].until(tokens)
        scored = await self._worker.score(partial)
        assert scored.reward is not None, "score returns a reward or raises"
        if partial.finish_reason is FinishReason.ABORTED:
            self._stages[index] += (scored.reward,)
        else:
            self._end(index, scored)

    async def _finish(self, index: int) -> None:
        if index not in self._ended:
            self._end(index, await self._worker.score(await self._decodings[index].finish()))

    async def _abort(self, index: int) -> None:
        self._end(index, await self._decodings[index].abort())

    def _end(self, index: int, candidate: Candidate) -> None:
        self._ended[index] = replace(candidate, stage_rewards=self._stages[index])

    def _running(self, indices: Iterable[int]) -> set[int]:
        return {i for i in indices if i not in self._ended}

    def _standing(self, alive: Iterable[int], checkpoint: int) -> dict[int, float]:
        """Return each candidate's reward as of a checkpoint: partial, or final where it has ended."""
        return {
            i: self._stages[i][checkpoint] if i not in self._ended else _final(self._ended[i])
            for i in alive
        }

    def _all(self) -> list[Candidate]:
        return [self._ended[i] for i in self._indices]


async def _first_success(ends: Sequence[Coroutine[Any, Any, Candidate]]) -> None:
    """Wait until one has ended well, and cancel the others. Raises what ended the last where none did."""
    tasks = [asyncio.ensure_future(end) for end in ends]
    try:
        for end in asyncio.as_completed(tasks):
            try:
                await end
            except ThumbloopError as error:
                failure = error
            else:
                return
    finally:
        await end_all(tasks)
    raise failure


def survivors(standing: Mapping[int, float], running: Set[int], keep: int) -> set[int]:
    """Return who goes on: the `keep` best, and whoever has ended and costs nothing any more."""
    best = sorted(standing, key=lambda i: (-standing[i], i))[:keep]
    return set(best) | (standing.keys() - running)


def race_weights(candidates: Sequence[Candidate], checkpoints: Sequence[Checkpoint]) -> list[float]:
    """Return 1 for the candidate that pruning would have left the best, 0 for the others, (N,).

    For an audit, which was not pruned, this replays what pruning would have done.
    """
    alive = set(range(len(candidates))) - falls(candidates, checkpoints).keys()
    best = min(alive, key=lambda i: (-_final(candidates[i]), i))
    return [float(i == best) for i in range(len(candidates))]


def falls(candidates: Sequence[Candidate], checkpoints: Sequence[Checkpoint]) -> dict[int, int]:
    """Return which candidates pruning aborts, each with the number of the checkpoint at which it falls."""
    fallen: dict[int, int] = {}
    for number, checkpoint in enumerate(checkpoints):
        if checkpoint.prunes:
            alive = set(range(len(candidates))) - fallen.keys()
            running = {i for i in alive if len(candidates[i].stage_rewards) > number}
            standing = {
                i: candidates[i].stage_rewards[number] if i in running else _final(candidates[i])
                for i in alive
            }
            kept = survivors(standing, running, checkpoint.keep)
            fallen |= dict.fromkeys(alive - kept, number)
    return fallen


def _final(candidate: Candidate) -> float:
    assert candidate.reward is not None, "a candidate that was not aborted has its reward"
    return candidate.reward


STRATEGY = SpeculativeRejection()
