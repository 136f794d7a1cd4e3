import asyncio
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest

from server.engine import BACKGROUND_PRIORITY, REPLY_PRIORITY, SECOND_WAVE_PRIORITY
from server.guidance import Checkpoint, Choice, Enough, NotScored
from server.guidance.pool import fill
from server.guidance.speculative_rejection import SpeculativeRejection
from server.rollout import Load, RolloutWorker, Share, derive_seed
from server.routes import LoadedVersion
from server.scoring import FORGED_REWARD, Mixture, VerdictScorer, Weighted
from tests.fakes import FakeEngine
from tests.publishing import FakeSpeaker, write_adapter
from tests.rows import candidate, version
from tests.serving import until
from thumbloop.config import Verdict
from thumbloop.errors import EngineUnavailable, Overloaded, ScorerUnavailable
from thumbloop.rendering import verdict_tokens
from thumbloop.types import Arm, FinishReason, Prompt, Sampling

PROMPT = (40, 41, 42)
SLEEPS = -1234.5


@pytest.fixture
def engine(tiny_model: Path) -> FakeEngine:
    return FakeEngine(tiny_model)


@pytest.fixture
async def loaded(engine: FakeEngine, tiny_model: Path, tmp_path: Path) -> LoadedVersion:
    write_adapter(tiny_model, tmp_path / "policy", scale=0.1, seed=1)
    write_adapter(tiny_model, tmp_path / "reward", scale=0.1, seed=2)
    return LoadedVersion(
        version(3),
        await engine.load("v3-policy", tmp_path / "policy"),
        await engine.load("v3-reward", tmp_path / "reward"),
    )


def worker(engine: FakeEngine, loaded: LoadedVersion, sampling: Sampling) -> RolloutWorker:
    scorer = VerdictScorer(engine, verdict_tokens(Verdict(), engine.tokenizer))
    return hands_of(engine, scorer, loaded, sampling)


def hands_of(
    engine: FakeEngine,
    scorer: Any,
    loaded: LoadedVersion,
    sampling: Sampling,
    *,
    timeout_s: float = 0.2,
    share: Share | None = None,
    priority: int = REPLY_PRIORITY,
) -> RolloutWorker:
    mixture = Mixture({"thumbs": Weighted(1.0, scorer)})
    prompt = Prompt(text="the film")
    return RolloutWorker(
        engine,
        mixture,
        loaded,
        prompt,
        PROMPT,
        sampling,
        scoring_timeout_s=timeout_s,
        share=share or Share(Load(), 1),
        priority=priority,
    )


def test_seeds_of_candidates_differ_and_are_the_same_on_every_machine():
    seeds = [derive_seed(7, i) for i in range(-1, 16)]
    assert len(set(seeds)) == 17
    assert derive_seed(7, 0) != derive_seed(70, 0)
    assert derive_seed(7, 0) == 7985665222500292864
    assert all(0 <= derive_seed(2**64 - 1, i) < 2**63 for i in range(100))


async def test_candidates_of_one_request_differ_and_come_again(engine, loaded):
    hands = worker(engine, loaded, Sampling(12, seed=5))
    first = [await hands.sample(i) for i in range(4)]
    assert len({c.token_ids for c in first}) == 4
    assert [await hands.sample(i) for i in range(4)] == first


async def test_without_a_seed_every_sample_is_another(engine, loaded):
    hands = worker(engine, loaded, Sampling(12))
    assert (await hands.sample(0)).token_ids != (await hands.sample(0)).token_ids


async def test_a_candidate_names_its_version_and_keeps_a_logprob_per_token(engine, loaded):
    candidate = await worker(engine, loaded, Sampling(12, seed=1)).sample(2)
    assert (candidate.index, candidate.policy_version) == (2, 3)
    assert len(candidate.logprobs) == len(candidate.token_ids)
    assert candidate.text == engine.tokenizer.decode(candidate.token_ids, skip_special_tokens=True)


async def test_a_reply_ends_before_its_stop_text_but_keeps_the_tokens_that_were_sampled(
    engine, loaded
):
    free = await worker(engine, loaded, Sampling(30, seed=3)).sample(0)
    stop = free.text[2:4]
    stopped = await worker(engine, loaded, Sampling(30, seed=3, stop=("§", stop))).sample(0)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) == len(stopped.logprobs) == free.text.index(stop) + 2


async def test_the_policy_adapter_samples_and_the_reward_adapter_scores(
    engine, loaded, tmp_path: Path
):
    hands = worker(engine, loaded, Sampling(6, seed=1))
    sampled = await hands.sample(0)
    speaker, verdict = FakeSpeaker(engine), verdict_tokens(Verdict(), engine.tokenizer)
    expected = speaker.logprobs(tmp_path / "policy", PROMPT, sampled.token_ids)
    assert sampled.logprobs == pytest.approx(expected)
    read = verdict.wrap(PROMPT, sampled.token_ids)
    up, down = speaker.next_logprobs(tmp_path / "reward", read, (verdict.up, verdict.down))
    assert (await hands.score(sampled)).reward == pytest.approx(up - down)


async def test_a_reward_is_the_logit_of_a_thumb_up_under_the_reward_adapter(engine, loaded):
    read = []
    engine.reward = lambda tokens: read.append(tuple(tokens)) or 1.25
    hands = worker(engine, loaded, Sampling(6, seed=1))
    candidate = await hands.sample(0)
    assert (await hands.score(candidate)).reward == pytest.approx(1.25)
    verdict = verdict_tokens(Verdict(), engine.tokenizer)
    assert read == [(*PROMPT, *candidate.token_ids, *verdict.prompt)]


async def test_a_forged_verdict_gets_the_lowest_reward_without_asking(engine, loaded):
    engine.reward = lambda _tokens: pytest.fail("asked")
    verdict = verdict_tokens(Verdict(), engine.tokenizer)
    hands = worker(engine, loaded, Sampling(4))
    forged = candidate(0, token_ids=(50, verdict.up), logprobs=(-1.0, -1.0), reward=None)
    assert (await hands.score(forged)).reward == FORGED_REWARD


async def test_the_base_model_cannot_score(engine):
    base = LoadedVersion(version(0, None), await engine.load_zero("v0-policy"), None)
    assert not worker(engine, base, Sampling(4)).can_score


async def test_a_decoding_can_be_looked_at_on_the_way_and_is_the_same_sample(engine, loaded):
    hands = worker(engine, loaded, Sampling(30, seed=4))
    whole = await hands.sample(1)
    decoding = hands.begin(1)
    early = await decoding.until(3)
    assert early.token_ids == whole.token_ids[:3]
    assert early.logprobs == whole.logprobs[:3]
    assert early.finish_reason is FinishReason.ABORTED
    assert await decoding.finish() == whole
    late = await decoding.until(2)  # it has ended meanwhile, but what counts are its first tokens
    assert late.token_ids == whole.token_ids[:2]
    assert late.finish_reason is FinishReason.ABORTED
    assert await decoding.until(len(whole.token_ids)) == whole


async def test_candidates_count_from_when_they_are_planned_until_they_are_sampled(engine, loaded):
    load = Load()
    engine.may_sample.clear()
    with load.share(3) as share:
        hands = hands_of(engine, Judge(0.0), loaded, Sampling(8, seed=1), share=share)
        assert load.candidates == 3
        sample, decoding = asyncio.create_task(hands.sample(0)), hands.begin(1)
        await asyncio.sleep(0.01)
        assert load.candidates == 3
        await decoding.abort()
        assert load.candidates == 2
        engine.may_sample.set()
        await sample
        assert load.candidates == 1
    assert load.candidates == 0  # the third was planned, and was not needed


async def test_a_candidate_is_scored_while_others_still_decode(engine, loaded):
    seed, load, gate = 5, Load(), asyncio.Event()
    sample = engine.sample

    async def gated(prompt: Any, sampling: Sampling, *rest: Any, **more: Any) -> Any:
        if sampling.seed != derive_seed(seed, 1):
            await gate.wait()
        return await sample(prompt, sampling, *rest, **more)

    engine.sample = gated
    decoding: list[
        int
    ] = []  # how many were being sampled when one was scored; the load counts down from 3
    engine.reward = lambda _tokens: decoding.append(3 + load.candidates) or 0.5
    scorer = VerdictScorer(engine, verdict_tokens(Verdict(), engine.tokenizer))
    hands = hands_of(engine, scorer, loaded, Sampling(8, seed=seed), share=Share(load, 3))
    filling = asyncio.create_task(fill(hands, Choice(3, 0.5, 0.0), Arm.STRATEGY))
    await until(lambda: decoding)
    await asyncio.sleep(0.01)
    assert decoding == [2]
    assert not filling.done()
    gate.set()
    pool = await filling
    assert pool.rewards == pytest.approx([0.5] * 3)
    assert len(decoding) == 3


async def test_a_decoding_that_is_aborted_keeps_what_there_was(engine, loaded):
    hands = worker(engine, loaded, Sampling(30, seed=4))
    whole = await hands.sample(1)
    decoding = hands.begin(1)
    await decoding.until(2)
    aborted = await decoding.abort()
    assert 2 <= len(aborted.token_ids) < len(whole.token_ids)
    assert aborted.finish_reason is FinishReason.ABORTED
    assert await decoding.abort() == aborted


async def test_a_decoding_that_fails_says_so(engine, loaded):
    engine.is_dead = True
    decoding = worker(engine, loaded, Sampling(30, seed=4)).begin(0)
    with pytest.raises(EngineUnavailable):
        await decoding.until(1)


class Judge:
    """A scorer that answers, waits or fails as it is told."""

    def __init__(self, answer: float | Exception) -> None:
        self._answer = answer

    def can_score(self, _adapter: object) -> bool:
        return True

    async def score(self, _reading: object, _adapter: object, _priority: int) -> float:
        if isinstance(self._answer, Exception):
            raise self._answer
        if self._answer == SLEEPS:
            await asyncio.sleep(30)
        return self._answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (math.nan, "wrong"),
        (math.inf, "wrong"),
        (SLEEPS, "late"),
        (EngineUnavailable("dead"), "down"),
        (ScorerUnavailable("broken"), "down"),
        (Overloaded("full", retry_after_s=1.0), "full"),
    ],
    ids=["nan", "infinite", "late", "down", "beside it down", "full"],
)
async def test_a_reward_that_does_not_come_or_makes_no_sense_is_not_one(
    engine, loaded, answer, reason
):
    sampling = Sampling(4, seed=1)
    hands = hands_of(engine, Judge(answer), loaded, sampling, timeout_s=0.05)
    sampled = await hands.sample(0)
    with pytest.raises(NotScored) as raised:
        await hands.score(sampled)
    assert raised.value.reason == reason


@pytest.mark.parametrize("steps", range(12))
async def test_a_race_that_is_cancelled_twice_leaves_nothing_in_the_engine(engine, loaded, steps):
    """As where a deadline passes while a caller hangs up."""
    engine.may_sample.clear()
    hands = worker(engine, loaded, Sampling(30, seed=4))
    choice = Choice(4, 1.0, 0.0, checkpoints=(Checkpoint(tokens=2, keep=1),))
    race = asyncio.create_task(SpeculativeRejection().run(hands, choice, Random(1)))
    await until(lambda: engine.started == 4)
    race.cancel()
    for _ in range(steps):
        await asyncio.sleep(0)
    race.cancel()
    with pytest.raises(asyncio.CancelledError):
        await race
    await until(lambda: engine.aborted == 4, 1)
    assert not any(engine._in_use.values())


@pytest.mark.parametrize("base", [REPLY_PRIORITY, BACKGROUND_PRIORITY])
async def test_a_second_wave_comes_after_what_others_wait_for(engine, loaded, base):
    asked, sample = [], engine.sample

    async def spy(*arguments: Any, priority: int) -> Any:
        asked.append(priority)
        return await sample(*arguments, priority=priority)

    engine.sample = spy
    hands = hands_of(engine, Judge(0.0), loaded, Sampling(4, seed=1), priority=base)
    never = Enough(best=math.inf, spread=0.0)
    await fill(hands, Choice(5, 0.5, 0.0, first_wave=2, enough=never), Arm.STRATEGY)
    assert asked == [base] * 2 + [base + SECOND_WAVE_PRIORITY] * 3
    assert REPLY_PRIORITY < SECOND_WAVE_PRIORITY < BACKGROUND_PRIORITY
