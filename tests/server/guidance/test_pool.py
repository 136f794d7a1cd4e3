"""Waves, time limits and propensities of the strategies that draw from a whole pool."""

import asyncio
import math
from collections import Counter
from random import Random

import pytest

from server.guidance import Choice, Enough
from server.guidance.best_of_n import BestOfN, best_weights
from server.guidance.pool import is_enough, pool_size
from server.guidance.soft_best_of_n import SoftBestOfN
from tests.guided import ScriptedWorker
from thumbloop.errors import EngineUnavailable
from thumbloop.types import Arm, Candidate, Extent

DRAWS = 4000
CONTENT = Enough(best=1.0, spread=2.0)


def test_the_best_reward_gets_all_the_weight_and_the_first_of_equals_wins():
    assert best_weights([0.5, 2.0, 2.0, -1.0], 0.5) == [0.0, 1.0, 0.0, 0.0]


def test_a_first_wave_is_enough_when_its_best_is_good_and_its_spread_is_small():
    assert is_enough([1.0, 0.5], CONTENT)
    assert not is_enough([0.9, 0.5], CONTENT)
    assert not is_enough([9.0, -9.0], CONTENT)
    assert not is_enough([9.0], None)


def test_the_pool_is_the_first_wave_only_where_that_was_enough():
    choice = Choice(4, 1.0, 0.0, first_wave=2, enough=CONTENT)
    assert pool_size([1.5, 1.0, 9.0, 9.0], choice) == 2
    assert pool_size([0.5, 0.0, 9.0, 9.0], choice) == 4
    assert pool_size([1.5, 1.0], Choice(2, 1.0, 0.0, first_wave=2, enough=CONTENT)) == 2


async def test_best_of_n_shows_the_best_and_its_losers_have_the_audits_share_only():
    worker = ScriptedWorker([0.0, 3.0, 1.0, -1.0])
    outcome = await BestOfN().run(worker, Choice(4, 0.5, 0.2), Random(2))
    assert outcome.arm is Arm.STRATEGY
    assert outcome.chosen.index == 1
    assert [c.propensity for c in outcome.candidates] == pytest.approx([0.05, 0.85, 0.05, 0.05])


async def test_a_good_first_wave_saves_the_second():
    worker = ScriptedWorker([1.5, 1.0, 9.0, 9.0])
    choice = Choice(4, 0.5, 0.0, first_wave=2, enough=CONTENT)
    outcome = await BestOfN().run(worker, choice, Random(1))
    assert sorted(worker.sampled) == [0, 1]
    assert outcome.extent is Extent.ENOUGH
    assert outcome.chosen.index == 0


async def test_a_poor_first_wave_is_followed_by_the_rest():
    worker = ScriptedWorker([0.0, 0.5, 2.0, 1.0])
    choice = Choice(4, 0.5, 0.0, first_wave=2, enough=CONTENT)
    outcome = await BestOfN().run(worker, choice, Random(1))
    assert sorted(worker.sampled) == [0, 1, 2, 3]
    assert (sorted(worker.urgent), sorted(worker.urgently_scored)) == ([0, 1], [0, 1])
    assert outcome.extent is Extent.REQUESTED
    assert [c.index for c in outcome.candidates] == [0, 1, 2, 3]
    assert outcome.chosen.index == 2


@pytest.mark.parametrize("strategy", [BestOfN(), SoftBestOfN()], ids=lambda s: s.name)
@pytest.mark.parametrize(
    "rewards", [[1.5, 1.0, 9.0, 2.0], [0.0, 0.5, 2.0, 1.0]], ids=["good", "poor"]
)
async def test_with_two_waves_each_candidate_is_shown_as_often_as_its_propensity_says(
    strategy, rewards
):
    """Whatever the arm was: an audit samples all, the strategy may have stopped after the first."""
    choice = Choice(4, 1.0, 0.3, first_wave=2, enough=CONTENT)
    rng, shown, stated = Random(7), Counter[int](), dict[int, set[float]]()
    for _ in range(DRAWS):
        outcome = await strategy.run(ScriptedWorker(rewards), choice, rng)
        shown[outcome.chosen.index] += 1
        for c in outcome.candidates:
            stated.setdefault(c.index, set()).add(round(c.propensity, 9))
    for index, said in stated.items():
        (propensity,) = said  # the same in both arms
        error = 4 * math.sqrt(propensity * (1 - propensity) / DRAWS)
        assert shown[index] / DRAWS == pytest.approx(propensity, abs=error)
    assert sum(propensity for (propensity,) in stated.values()) == pytest.approx(1)


async def test_near_the_deadline_the_answer_is_chosen_from_what_is_ready():
    worker = ScriptedWorker([5.0, 1.0, 2.0], slow=[0])
    outcome = await SoftBestOfN().run(worker, Choice(3, 0.5, 0.0, time_limit_s=0.05), Random(1))
    assert [c.index for c in outcome.candidates] == [1, 2]
    assert (outcome.arm, outcome.extent) == (Arm.FALLBACK, Extent.DEADLINE)
    assert (outcome.fallback, outcome.selected) == ("deadline", "cut")
    assert not outcome.reranked
    assert [c.propensity for c in outcome.candidates] == [None, None]


async def test_when_nothing_is_ready_the_first_candidate_is_waited_for():
    worker = ScriptedWorker([5.0, 1.0], slow=[0, 1])
    run = asyncio.create_task(
        SoftBestOfN().run(worker, Choice(2, 0.5, 0.0, time_limit_s=0.0), Random(1))
    )
    await asyncio.sleep(0.05)
    assert not run.done()
    worker.release.set()
    assert (await run).fallback == "deadline"


async def test_past_the_deadline_a_reply_that_is_there_does_not_wait_for_its_reward():
    worker = ScriptedWorker([5.0, 1.0], slow=[0, 1])

    async def never(_given: Candidate, **_how: object) -> Candidate:
        await asyncio.Event().wait()
        raise AssertionError

    worker.score = never  # type: ignore[method-assign]
    run = asyncio.create_task(
        SoftBestOfN().run(worker, Choice(2, 0.5, 0.0, time_limit_s=0.0), Random(1))
    )
    await asyncio.sleep(0.05)
    worker.release.set()
    assert (await asyncio.wait_for(run, 5)).fallback == "deadline"


async def test_a_second_wave_is_not_begun_too_late():
    worker = ScriptedWorker([0.0, 0.5, 2.0, 1.0])
    choice = Choice(4, 0.5, 0.0, first_wave=2, enough=CONTENT, time_limit_s=0.0)
    outcome = await BestOfN().run(worker, choice, Random(1))
    assert sorted(worker.sampled) == [0, 1]
    assert (outcome.extent, outcome.fallback) == (Extent.DEADLINE, "deadline")


async def test_a_second_wave_that_is_late_is_not_waited_for():
    worker = ScriptedWorker([0.0, 0.5, 2.0, 1.0], slow=[2, 3])
    choice = Choice(4, 0.5, 0.0, first_wave=2, enough=CONTENT, time_limit_s=0.05)
    outcome = await BestOfN().run(worker, choice, Random(1))
    assert [c.index for c in outcome.candidates] == [0, 1]
    assert (outcome.extent, outcome.selected) == (Extent.DEADLINE, "cut")


async def test_a_first_wave_that_could_not_be_scored_was_not_good_enough():
    worker = ScriptedWorker([1.5, None, 9.0, 9.0])
    choice = Choice(4, 0.5, 0.0, first_wave=2, enough=CONTENT)
    outcome = await BestOfN().run(worker, choice, Random(1))
    assert (outcome.extent, outcome.fallback) == (Extent.UNSCORED, "full")
    assert outcome.selected == ""
    assert worker.sampled == [0, 1]


async def test_a_time_limit_that_is_not_reached_changes_nothing():
    worker = ScriptedWorker([5.0, 1.0])
    outcome = await SoftBestOfN().run(worker, Choice(2, 0.5, 0.0, time_limit_s=30.0), Random(1))
    assert outcome.reranked
    assert outcome.extent is Extent.REQUESTED


async def test_one_sample_that_fails_ends_the_others():
    worker = ScriptedWorker([1.0, 1.0, 1.0], slow=[1, 2])
    ended = []
    sample = worker.sample

    async def watched(index: int, **_how: object) -> Candidate:
        if index == 0:
            await asyncio.sleep(0.01)
            raise EngineUnavailable("dead")
        try:
            return await sample(index)
        except asyncio.CancelledError:
            ended.append(index)
            raise

    worker.sample = watched  # type: ignore[method-assign]
    with pytest.raises(EngineUnavailable):
        await SoftBestOfN().run(worker, Choice(3, 0.5, 0.0, time_limit_s=5.0), Random(1))
    assert sorted(ended) == [1, 2]
