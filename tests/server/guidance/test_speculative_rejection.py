"""Speculative rejection: who is aborted when, what is stored of them, and how likely each was shown."""

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from server.guidance import Checkpoint, Choice
from server.guidance.speculative_rejection import (
    SpeculativeRejection,
    falls,
    race_weights,
    survivors,
)
from tests.guided import ScriptedDecoding, ScriptedWorker
from tests.rows import candidate
from thumbloop.errors import Overloaded
from thumbloop.types import Arm, Candidate, Extent, FinishReason

DRAWS = 4000
LOOKS = (Checkpoint(2, 2), Checkpoint(5, 1))


def choose(n: int, audit_share: float = 0.0, looks=LOOKS, limit: float | None = None) -> Choice:
    return Choice(n, 0.5, audit_share, checkpoints=looks, time_limit_s=limit)


async def run(worker: ScriptedWorker, choice: Choice, seed: int = 1):
    return await SpeculativeRejection().run(worker, choice, Random(seed))


def test_the_best_go_on_and_so_does_who_has_ended():
    standing = {0: 1.0, 1: 3.0, 2: 2.0, 3: -5.0}
    assert survivors(standing, {0, 1, 2, 3}, 2) == {1, 2}
    assert survivors(standing, {0, 1, 2}, 2) == {1, 2, 3}
    assert survivors({0: 1.0, 1: 1.0}, {0, 1}, 1) == {0}


async def test_losers_are_aborted_at_each_checkpoint_and_the_last_one_is_shown():
    worker = ScriptedWorker([0.0, 3.0, 2.0, 1.0], tokens=10)
    outcome = await run(worker, choose(4))
    assert sorted(worker.aborted) == [0, 2, 3]
    assert worker.decoded == {0: 2, 1: 10, 2: 5, 3: 2}
    assert outcome.chosen.index == 1
    assert outcome.reranked
    by_index = {c.index: c for c in outcome.candidates}
    assert by_index[0].finish_reason is FinishReason.ABORTED
    assert by_index[0].reward is None
    assert by_index[0].stage_rewards == (0.0,)
    assert len(by_index[0].token_ids) == len(by_index[0].logprobs) == 2
    assert by_index[2].stage_rewards == (2.0, 2.0)
    assert by_index[1].stage_rewards == (3.0, 3.0)
    assert by_index[1].reward == 3.0


async def test_a_late_bloomer_is_lost_to_pruning_but_not_to_an_audit():
    """What a partial score is worth can only be seen where nothing is pruned."""

    def blooms(tokens: int) -> float:
        return 9.0 if tokens == 10 else -9.0

    worker = ScriptedWorker([blooms, 1.0, 2.0], tokens=10)
    assert (await run(worker, choose(3))).chosen.index == 2
    audit = await run(ScriptedWorker([blooms, 1.0, 2.0], tokens=10), choose(3, 1.0))
    assert audit.arm is Arm.AUDIT
    by_index = {c.index: c for c in audit.candidates}
    assert by_index[0].reward == 9.0
    assert by_index[0].stage_rewards == (-9.0, -9.0)
    assert all(c.finish_reason is FinishReason.STOP for c in audit.candidates)


async def test_a_short_candidate_competes_with_its_final_reward():
    worker = ScriptedWorker([5.0, 1.0, 2.0], tokens=[1, 10, 10])
    outcome = await run(worker, choose(3))
    assert outcome.chosen.index == 0
    by_index = {c.index: c for c in outcome.candidates}
    assert by_index[0].stage_rewards == ()
    assert worker.scored.count((0, 1)) == 1
    assert sorted(worker.aborted) == [1, 2]


async def test_a_checkpoint_that_only_looks_aborts_nobody():
    looks = (Checkpoint(2, 1, prunes=False), Checkpoint(5, 1))
    worker = ScriptedWorker([0.0, 3.0, 2.0], tokens=10)
    outcome = await run(worker, choose(3, looks=looks))
    assert worker.decoded == {0: 5, 1: 10, 2: 5}
    assert [c.stage_rewards for c in outcome.candidates] == [(0.0, 0.0), (3.0, 3.0), (2.0, 2.0)]


@pytest.mark.parametrize(
    "rewards",
    [
        [0.0, 3.0, 2.0, 1.0],
        [lambda t: 9.0 if t == 10 else -9.0, 1.0, 2.0, 0.0],
        [lambda t: -t, lambda t: t / 2, 0.0, 1.5],
    ],
    ids=["steady", "late bloomer", "crossing"],
)
async def test_each_candidate_is_shown_as_often_as_its_propensity_says(rewards):
    rng, shown, stated = Random(3), Counter[int](), dict[int, set[float]]()
    for _ in range(DRAWS):
        worker = ScriptedWorker(rewards, tokens=[10, 10, 3, 10])
        outcome = await SpeculativeRejection().run(worker, choose(4, 0.2), rng)
        shown[outcome.chosen.index] += 1
        for c in outcome.candidates:
            stated.setdefault(c.index, set()).add(round(c.propensity, 9))
    for index, said in stated.items():
        (propensity,) = said  # an audit replays what pruning would have done
        error = 4 * math.sqrt(propensity * (1 - propensity) / DRAWS)
        assert shown[index] / DRAWS == pytest.approx(propensity, abs=error)


def test_an_audit_replays_the_pruning():
    ended = {"chosen": False, "propensity": None}
    candidates = [
        candidate(0, reward=9.0, stage_rewards=(-1.0, 0.0), **ended),
        candidate(1, reward=1.0, stage_rewards=(0.5, 0.6), **ended),
        candidate(2, reward=2.0, stage_rewards=(0.4, 0.7), **ended),
    ]
    assert race_weights(candidates, LOOKS) == [0.0, 0.0, 1.0]
    assert falls(candidates, LOOKS) == {0: 0, 1: 1}  # each at the look that it lost
    first_only = (Checkpoint(2, 2), Checkpoint(5, 1, prunes=False))
    assert race_weights(candidates, first_only) == [0.0, 0.0, 1.0]
    second_only = (Checkpoint(2, 2, prunes=False), Checkpoint(5, 1))
    assert race_weights(candidates, second_only) == [0.0, 0.0, 1.0]
    by_first = [replace(c, stage_rewards=(s,)) for c, s in zip(candidates, (5, 1, 0), strict=True)]
    assert race_weights(by_first, (Checkpoint(2, 1),)) == [1.0, 0.0, 0.0]
    assert race_weights(candidates, (Checkpoint(2, 1),)) == [0.0, 1.0, 0.0]
    assert race_weights(candidates, ()) == [1.0, 0.0, 0.0]


async def test_without_checkpoints_or_a_reward_model_all_are_finished():
    worker = ScriptedWorker([0.0, 3.0], tokens=10)
    assert (await run(worker, choose(2, looks=()))).chosen.index == 1
    assert worker.aborted == []
    unjudged = await run(ScriptedWorker([None, None], can_score=False), choose(2))
    assert not unjudged.reranked


async def test_when_scoring_fails_all_that_still_run_are_finished_and_the_likeliest_is_shown():
    worker = ScriptedWorker([1.0, None, 1.0], tokens=10, logprob=lambda i: -2.0 + 0.5 * i)
    outcome = await run(worker, choose(3))
    assert (outcome.arm, outcome.fallback, outcome.reranked) == (Arm.FALLBACK, "full", False)
    assert outcome.chosen.index == 2
    assert all(len(c.token_ids) == 10 for c in outcome.candidates)
    assert all(c.propensity is None for c in outcome.candidates)


async def test_at_the_deadline_what_there_is_is_shown():
    worker = ScriptedWorker([1.0, 2.0], tokens=[1, 10], slow=[1])
    outcome = await run(worker, choose(2, limit=0.05))
    assert outcome.chosen.index == 0
    assert (outcome.fallback, outcome.extent) == ("deadline", Extent.DEADLINE)
    assert worker.aborted == [1]


async def test_at_the_deadline_one_finished_candidate_is_waited_for():
    worker = ScriptedWorker([1.0, 2.0], tokens=10, slow=[0, 1])
    task = asyncio.create_task(run(worker, choose(2, limit=0.0)))
    await asyncio.sleep(0.05)
    assert not task.done()
    worker.release.set()
    outcome = await task
    assert outcome.chosen.finish_reason is FinishReason.STOP
    assert (outcome.fallback, outcome.selected) == ("deadline", "cut")


class Failing(ScriptedWorker):
    """Decodings fail, but for those of `healthy`, which end when they are released."""

    def __init__(self, *, healthy: Sequence[int]) -> None:
        super().__init__([1.0, 2.0], tokens=10, slow=[0, 1])
        self.healthy = healthy

    def begin(self, index: int) -> ScriptedDecoding:
        decoding = super().begin(index)
        if index not in self.healthy:

            async def fail() -> Candidate:
                raise Overloaded("full", retry_after_s=1)

            decoding.finish = fail  # type: ignore[method-assign]
        return decoding


async def test_past_the_deadline_a_candidate_that_fails_is_no_reply():
    worker = Failing(healthy=[1])
    task = asyncio.create_task(run(worker, choose(2, limit=0.0)))
    await asyncio.sleep(0.05)
    assert not task.done()
    worker.release.set()
    outcome = await task
    assert (outcome.chosen.index, outcome.chosen.finish_reason) == (1, FinishReason.STOP)


async def test_past_the_deadline_candidates_that_all_fail_are_a_failure():
    worker = Failing(healthy=[])
    with pytest.raises(Overloaded):
        await run(worker, choose(2, limit=0.0))
    assert sorted(worker.aborted) == [0, 1]


async def test_scoring_that_fails_does_not_outlive_the_deadline():
    worker = ScriptedWorker([None, 2.0, 1.0], tokens=[10, 10, 1], slow=[1])
    outcome = await asyncio.wait_for(run(worker, choose(3, limit=0.1)), 5)
    assert not outcome.reranked
    assert outcome.chosen.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("share", "looks", "selected"),
    [
        (0.0, LOOKS, "pruned"),
        (1.0, LOOKS, ""),
        (0.0, (Checkpoint(2, 1, prunes=False),), ""),
        (0.0, (Checkpoint(50, 1),), "pruned"),
    ],
    ids=["pruned", "audit", "only looked", "all were short"],
)
async def test_what_could_be_pruned_is_no_sample_of_the_policy(share, looks, selected):
    worker = ScriptedWorker([0.0, 3.0, 2.0], tokens=10)
    assert (await run(worker, choose(3, share, looks))).selected == selected


async def test_whatever_goes_wrong_nothing_is_left_running():
    worker = ScriptedWorker([1.0, 2.0], tokens=10)

    async def broken(_given):
        raise ZeroDivisionError

    worker.score = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        await run(worker, choose(2))
    assert sorted(worker.aborted) == [0, 1]
