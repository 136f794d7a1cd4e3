"""The propensity that is logged has to be the frequency with which a candidate is really shown."""

import math
from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.guidance import Choice
from server.guidance.outcome import marginal_propensities
from server.guidance.pool import draw
from server.guidance.soft_best_of_n import SoftBestOfN, soft_weights
from tests.guided import ScriptedWorker
from thumbloop.errors import EngineUnavailable
from thumbloop.types import Arm, Candidate

DRAWS = 20_000


def worker_of(rewards: list[float | None], **options: Any) -> ScriptedWorker:
    return ScriptedWorker(rewards, logprob=lambda index: -0.1 if index == 2 else -2.0, **options)


def test_weights_are_the_softmax_of_rewards_over_temperature():
    # e^(ln 4 / 1), e^0: 4 to 1. At temperature 0.5 the ratio is squared, 16 to 1.
    assert soft_weights([math.log(4), 0.0], 1.0) == pytest.approx([0.8, 0.2])
    assert soft_weights([math.log(4), 0.0], 0.5) == pytest.approx([16 / 17, 1 / 17])


def test_weights_do_not_overflow():
    assert soft_weights([1e6, 0.0, -1e6], 0.01) == [1.0, 0.0, 0.0]
    assert soft_weights([-100.0, -100.0], 0.01) == [0.5, 0.5]


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=16),
    st.floats(0.01, 100),
    st.floats(-50, 50),
)
def test_weights_sum_to_1_keep_the_order_and_ignore_a_common_shift(rewards, temperature, shift):
    weights = soft_weights(rewards, temperature)
    assert sum(weights) == pytest.approx(1)
    ranked = sorted(range(len(rewards)), key=lambda i: rewards[i])
    assert [weights[i] for i in ranked] == sorted(weights)
    assert soft_weights([r + shift for r in rewards], temperature) == pytest.approx(weights)


def test_the_audit_share_is_mixed_in_evenly():
    assert marginal_propensities([0.8, 0.2], 0.1, 2) == pytest.approx([0.77, 0.23])
    assert marginal_propensities([1.0, 0.0], 1.0, 2) == [0.5, 0.5]
    assert marginal_propensities([1.0, 0.0], 0.0, 2) == [1.0, 0.0]


def test_an_audit_ignores_the_weights():
    shown = Counter(draw([1.0, 0.0], Arm.AUDIT, Random(i)) for i in range(1000))
    assert shown[1] == pytest.approx(500, abs=70)
    assert {draw([1.0, 0.0], Arm.STRATEGY, Random(i)) for i in range(1000)} == {0}


@pytest.mark.parametrize(
    ("rewards", "choice"),
    [
        ([0.0, 1.0, 2.0, -1.0], Choice(4, 1.0, 0.2)),
        ([0.5, 0.5, 3.0], Choice(3, 0.5, 0.05)),
        ([-100.0, 0.0], Choice(2, 0.5, 0.3)),
    ],
)
async def test_each_candidate_is_shown_as_often_as_its_propensity_says(rewards, choice):
    worker, rng = worker_of(rewards), Random(20)
    shown: Counter[int] = Counter()
    arms: Counter[Arm] = Counter()
    for _ in range(DRAWS):
        outcome = await SoftBestOfN().run(worker, choice, rng)
        shown[outcome.chosen.index] += 1
        arms[outcome.arm] += 1
    stated = [c.propensity for c in outcome.candidates]
    assert sum(stated) == pytest.approx(1)
    for index, propensity in enumerate(stated):
        error = 4 * math.sqrt(propensity * (1 - propensity) / DRAWS)
        assert shown[index] / DRAWS == pytest.approx(propensity, abs=error)
    share = arms[Arm.AUDIT] / DRAWS
    assert share == pytest.approx(choice.audit_share, abs=4 * 0.5 / math.sqrt(DRAWS))
    assert outcome.reranked


async def test_a_base_model_without_rewards_shows_any_candidate_alike():
    worker, rng = worker_of([None] * 4, can_score=False), Random(21)
    choice = Choice(4, 0.5, 0.1)
    outcomes = [await SoftBestOfN().run(worker, choice, rng) for _ in range(4000)]
    assert worker.scored == []
    for outcome in outcomes[:50]:
        assert [c.propensity for c in outcome.candidates] == [0.25] * 4
        assert [c.reward for c in outcome.candidates] == [None] * 4
        assert not outcome.reranked
    shown = Counter(o.chosen.index for o in outcomes)
    for index in range(4):
        assert shown[index] == pytest.approx(1000, abs=4 * math.sqrt(4000 * 0.25 * 0.75))


async def test_a_missing_reward_falls_back_to_the_likeliest_and_claims_no_propensity():
    worker = worker_of([5.0, None, 0.0, 1.0])
    outcome = await SoftBestOfN().run(worker, Choice(4, 0.5, 0.03), Random(1))
    assert (outcome.arm, outcome.fallback) == (Arm.FALLBACK, "full")
    assert not outcome.reranked
    assert outcome.chosen.index == 2
    assert [c.propensity for c in outcome.candidates] == [None] * 4
    assert [c.reward for c in outcome.candidates] == [5.0, None, 0.0, 1.0]


async def test_exactly_one_candidate_is_chosen_and_all_are_kept():
    outcome = await SoftBestOfN().run(worker_of([1.0] * 16), Choice(16, 1.0, 0.03), Random(2))
    assert [c.index for c in outcome.candidates] == list(range(16))
    assert [c.chosen for c in outcome.candidates].count(True) == 1


async def test_one_candidate_is_shown_for_sure():
    outcome = await SoftBestOfN().run(worker_of([-3.0]), Choice(1, 0.5, 0.03), Random(3))
    assert outcome.chosen.propensity == 1.0


async def test_the_same_seed_makes_the_same_choice():
    worker = worker_of([0.0, 0.1, 0.2])
    runs = [await SoftBestOfN().run(worker, Choice(3, 1.0, 0.5), Random(9)) for _ in range(5)]
    assert len({(r.chosen.index, r.arm) for r in runs}) == 1


async def test_an_engine_that_dies_while_sampling_is_not_papered_over():
    worker = worker_of([1.0, 1.0])

    async def die(_index: int, **_how: object) -> Candidate:
        raise EngineUnavailable("dead")

    worker.sample = die  # type: ignore[method-assign]
    with pytest.raises(EngineUnavailable):
        await SoftBestOfN().run(worker, Choice(2, 1.0, 0.0), Random(1))
