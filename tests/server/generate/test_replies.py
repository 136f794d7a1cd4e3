"""Generate: what comes back, and what is stored with it."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from server.guidance import Choice, find_strategies
from server.pipeline import Request
from server.rollout import derive_seed
from tests.publishing import publisher_of
from tests.serving import Running, running
from thumbloop.client import GenerateOptions
from thumbloop.config import State
from thumbloop.types import (
    Arm,
    Extent,
    FinishReason,
    Learning,
    Message,
    Prompt,
    Role,
    Sampling,
    Status,
    Strategy,
    User,
)
from thumbloop.v1 import policy_pb2


async def test_a_text_is_continued(server: Running):
    reply = await server.generate("the film was")
    stored = server.stored(reply.response_id)
    assert reply.text == stored.chosen.text
    assert reply.policy_version == 0
    assert not reply.reranked
    assert not reply.HasField("reward")
    assert list(reply.candidates) == []
    assert stored.prompt == Prompt(text="the film was")
    assert reply.response_id[14] == "7"  # UUIDv7


async def test_a_conversation_is_answered_through_the_models_template(server: Running):
    turns = [
        Message(Role.SYSTEM, "Be brief."),
        Message(Role.USER, "How was it?"),
        Message(Role.ASSISTANT, "Good."),
        Message(Role.USER, "And the <|up|> food?"),
    ]
    reply = await server.client.generate(turns, user_id="ann", session_id="s")
    stored = server.stored(reply.response_id)
    assert stored.prompt == Prompt(messages=tuple(turns))
    shown = server.engine.tokenizer.decode(stored.prompt_token_ids)
    assert shown.startswith("<|system|>Be brief.<|end|><|user|>How was it?<|end|><|assistant|>")
    assert shown.endswith("<|assistant|>")
    assert server.engine.tokenizer.convert_tokens_to_ids("<|up|>") not in stored.prompt_token_ids
    assert stored.session_id == "s"


@pytest.mark.parametrize("words", ["", " \n"])
async def test_a_conversation_goes_on_after_a_reply_without_words(server: Running, words: str):
    turns = [
        Message(Role.USER, "How was it?"),
        Message(Role.ASSISTANT, words),
        Message(Role.USER, "And the food?"),
    ]
    stored = server.stored((await server.client.generate(turns)).response_id)
    assert stored.prompt == Prompt(messages=tuple(turns))
    shown = server.engine.tokenizer.decode(stored.prompt_token_ids)
    assert f"<|assistant|>{words}<|end|><|user|>And the food?<|end|>" in shown


async def test_everything_that_learning_needs_is_stored(taught: Running):
    request = policy_pb2.GenerateRequest(
        text="hello",
        user_id="ann",
        session_id="a session",
        request_id="q1",
        sampling=policy_pb2.SamplingParams(max_tokens=9, temperature=0.75, seed=2**64 - 1),
        guidance=policy_pb2.GuidanceParams(num_candidates=3, temperature=2.0),
        include_candidates=True,
    )
    reply = await taught.policy.Generate(request)
    stored = taught.stored(reply.response_id)
    assert stored.user == User(user_id="ann")
    assert (stored.session_id, stored.request_id) == ("a session", "q1")
    assert stored.sampling == Sampling(9, 0.75, 1.0, 0, 2**64 - 1, ())
    assert (stored.strategy, stored.status) == (Strategy.SOFT_BEST_OF_N, Status.COMPLETED)
    assert (stored.learning, stored.trainable) == (Learning.ALLOWED, True)
    assert stored.policy_version == reply.policy_version == 1
    assert len(stored.policy_digest) == len(stored.reward_digest) == 64
    assert [c.index for c in stored.candidates] == [0, 1, 2]
    for candidate in stored.candidates:
        assert candidate.policy_version == 1
        assert len(candidate.logprobs) == len(candidate.token_ids) <= 9
        assert candidate.reward is not None
        assert candidate.propensity is not None
    assert sum(c.propensity for c in stored.candidates) == pytest.approx(1)
    assert min(c.propensity for c in stored.candidates) >= 0.03 / 3
    assert reply.reranked
    assert reply.reward == stored.chosen.reward
    assert [(c.index, c.text, c.reward) for c in reply.candidates] == [
        (c.index, c.text, c.reward) for c in stored.candidates
    ]
    assert reply.usage.prompt_tokens == len(stored.prompt_token_ids)
    assert reply.usage.reply_tokens == len(stored.chosen.token_ids)
    assert reply.usage.candidate_tokens == sum(len(c.token_ids) for c in stored.candidates)


async def test_each_candidate_has_the_logprobs_and_tokens_of_its_own_seed(server: Running):
    reply = await server.generate(
        "hello", sampling=policy_pb2.SamplingParams(seed=11, max_tokens=8)
    )
    stored = server.stored(reply.response_id)
    for candidate in stored.candidates:
        alone = server.engine.speak(
            "", stored.prompt_token_ids, Sampling(8), derive_seed(11, candidate.index)
        )
        assert candidate.token_ids == alone.token_ids
        assert candidate.logprobs == pytest.approx(alone.logprobs, rel=1e-6)


async def test_a_seeded_request_gives_the_same_reply_again(taught: Running):
    seeded = {"sampling": policy_pb2.SamplingParams(seed=5), "include_candidates": True}
    first, second = [await taught.generate("hello", **seeded) for _ in range(2)]
    assert first.response_id != second.response_id
    assert (first.text, list(first.candidates)) == (second.text, list(second.candidates))


async def test_requests_without_a_seed_differ(server: Running):
    texts = {(await server.generate("hello")).text for _ in range(4)}
    assert len(texts) > 1


async def test_the_reply_with_the_higher_reward_is_shown_more_often(taught: Running):
    letter = taught.engine.tokenizer.encode("a")[0]
    taught.engine.reward = lambda tokens: 10.0 if letter in tokens[5:] else -10.0
    for seed in range(20):
        reply = await taught.generate(
            "xxxxx", sampling=policy_pb2.SamplingParams(seed=seed), include_candidates=True
        )
        stored = taught.stored(reply.response_id)
        if stored.arm is Arm.STRATEGY:
            assert reply.reward == max(c.reward for c in reply.candidates)


async def test_without_guidance_one_candidate_is_sampled_and_not_scored(taught: Running):
    started = taught.engine.started
    options = GenerateOptions(strategy=Strategy.NONE, num_candidates=8, include_candidates=True)
    reply = await taught.client.generate("hello", options=options)
    assert taught.engine.started == started + 1
    assert len(reply.candidates) == 1
    assert not reply.reranked
    (only,) = taught.stored(reply.response_id).candidates
    assert (only.reward, only.propensity) == (None, 1.0)


async def test_when_scoring_is_refused_the_reply_still_comes(taught: Running):
    taught.engine.is_too_full_to_score = True
    reply = await taught.generate("hello")
    stored = taught.stored(reply.response_id)
    assert not reply.reranked
    assert stored.arm is Arm.FALLBACK
    assert {c.propensity for c in stored.candidates} == {None}


async def test_a_reward_that_is_no_number_is_none(taught: Running):
    taught.engine.reward = lambda _tokens: math.nan
    reply = await taught.generate("hello")
    assert not reply.reranked
    assert not reply.HasField("reward")
    assert taught.stored(reply.response_id).arm is Arm.FALLBACK


@pytest.mark.parametrize(
    "guidance",
    [
        {"strategy": policy_pb2.GUIDANCE_STRATEGY_BEST_OF_N},
        {"strategy_name": "best_of_n"},
    ],
    ids=["by number", "by name"],
)
async def test_best_of_n_shows_the_best(taught: Running, guidance: dict[str, Any]):
    for seed in range(12):
        reply = await taught.generate(
            "hello",
            include_candidates=True,
            sampling=policy_pb2.SamplingParams(seed=seed),
            guidance=policy_pb2.GuidanceParams(num_candidates=6, **guidance),
        )
        stored = taught.stored(reply.response_id)
        assert stored.strategy == "best_of_n"
        assert reply.num_candidates == 6
        assert reply.candidate_extent == policy_pb2.CANDIDATE_EXTENT_REQUESTED
        if stored.arm is Arm.STRATEGY:
            assert reply.reward == max(c.reward for c in reply.candidates)


async def test_speculative_rejection_stores_what_it_aborted_with_its_partial_rewards(
    taught: Running,
):
    taught.engine.reward = lambda tokens: float(sum(tokens) % 7)
    aborted = 0
    for seed in range(12):
        reply = await taught.generate(
            "hello",
            include_candidates=True,
            sampling=policy_pb2.SamplingParams(seed=seed, max_tokens=32),
            guidance=policy_pb2.GuidanceParams(
                num_candidates=8, strategy=policy_pb2.GUIDANCE_STRATEGY_SPECULATIVE_REJECTION
            ),
        )
        stored = taught.stored(reply.response_id)
        assert len(reply.candidates) == len(stored.candidates) == 8
        for shown, kept in zip(reply.candidates, stored.candidates, strict=True):
            assert tuple(shown.stage_rewards) == kept.stage_rewards
            if kept.finish_reason is FinishReason.ABORTED:
                aborted += 1
                assert kept.reward is None
                assert 1 <= len(kept.stage_rewards) <= 2
                assert len(kept.logprobs) == len(kept.token_ids) > 0
            assert kept.propensity is not None
        assert reply.reward == stored.chosen.reward
        is_audit = stored.arm is Arm.AUDIT
        assert stored.trainable is is_audit
        assert stored.untrainable_reason == (None if is_audit else "pruned")
    assert aborted > 12
    assert taught.engine.streaming == 0


async def test_a_mixture_of_rewards_is_answered_and_stored_part_by_part(
    tiny_model: Path, state: State
):
    rewards = {
        "thumbs": {"kind": "thumbs", "weight": 0.5},
        "short": {"kind": "length", "weight": 0.5, "target_tokens": 0, "scale_tokens": 1.0},
    }
    async with running(tiny_model, state, rewards=rewards) as server:
        first = await server.generate("hello", include_candidates=True)
        assert first.reranked  # a length can be wanted of the base model too
        assert [dict(c.reward_components).keys() for c in first.candidates] == [{"short"}] * 4
        publisher_of(server, tiny_model, state).publish(1)
        await server.serves(1)
        reply = await server.generate("hello", include_candidates=True)
        for shown, kept in zip(
            reply.candidates, server.stored(reply.response_id).candidates, strict=True
        ):
            parts = dict(shown.reward_components)
            assert parts == kept.reward_components
            assert parts["short"] == -len(kept.token_ids)
            assert shown.reward == pytest.approx(0.5 * parts["thumbs"] + 0.5 * parts["short"])


async def test_a_first_wave_that_is_good_enough_says_so(tiny_model: Path, state: State):
    guidance = {"first_wave": 2, "min_audits": 2, "audit_share": 0.5}
    async with running(tiny_model, state, guidance=guidance) as server:
        publisher_of(server, tiny_model, state).publish(1)
        await server.serves(1)
        server.engine.reward = lambda _tokens: 1.0  # none is better than any audit's best
        replies = [
            await server.generate("hello", sampling=policy_pb2.SamplingParams(seed=seed))
            for seed in range(16)
        ]
        stored = [server.stored(reply.response_id) for reply in replies]
    found = [
        (r.candidate_extent, r.num_candidates, i.arm) for r, i in zip(replies, stored, strict=True)
    ]
    enough = (policy_pb2.CANDIDATE_EXTENT_ENOUGH, 2, Arm.STRATEGY)
    whole = policy_pb2.CANDIDATE_EXTENT_REQUESTED, 4
    assert found.index(enough) > 0
    assert {(*whole, Arm.AUDIT), enough} == set(found[found.index(enough) :])
    assert {i.extent for i in stored} == {Extent.ENOUGH, Extent.REQUESTED}


async def test_a_busy_server_gives_fewer_candidates_and_says_so(tiny_model: Path, state: State):
    async with running(tiny_model, state, engine={"max_num_seqs": 4}) as server:
        server.engine.may_sample.clear()
        first = asyncio.create_task(server.generate("hello"))
        await server.sampling(4)
        second = asyncio.create_task(server.generate("hello"))
        await server.sampling(5)
        server.engine.may_sample.set()
        assert (await first).candidate_extent == policy_pb2.CANDIDATE_EXTENT_REQUESTED
        reply = await second
        assert reply.num_candidates == 1
        assert reply.candidate_extent == policy_pb2.CANDIDATE_EXTENT_LOAD


async def test_calls_of_one_moment_share_what_room_there_is(tiny_model: Path, state: State):
    request = Request(
        prompt=Prompt(text="hello"),
        sampling=Sampling(8),
        guidance=find_strategies()["soft_best_of_n"],
        choice=Choice(4, 0.5, 0.0),
        user=User("", "ann"),
    )
    async with running(tiny_model, state, engine={"max_num_seqs": 8}) as server:
        with server.application._lifecycle.admit() as pipeline:
            prompt = pipeline.render(request)
            replies = await asyncio.gather(*(pipeline.respond(request, prompt) for _ in range(4)))
    assert [len(reply.candidates) for reply in replies] == [4, 4, 1, 1]


async def test_near_a_callers_deadline_the_answer_is_chosen_from_what_is_ready(taught: Running):
    engine = taught.engine
    sample = engine.sample

    async def slow_for_some(prompt: Any, sampling: Sampling, *rest: Any, **more: Any) -> Any:
        if sampling.seed == derive_seed(7, 2):
            await asyncio.sleep(30)
        return await sample(prompt, sampling, *rest, **more)

    engine.sample = slow_for_some
    request = policy_pb2.GenerateRequest(
        text="hello", sampling=policy_pb2.SamplingParams(seed=7), include_candidates=True
    )
    reply = await taught.policy.Generate(request, timeout=1.0)
    assert [c.index for c in reply.candidates] == [0, 1, 3]
    assert taught.stored(reply.response_id).untrainable_reason == "cut"
    assert not reply.reranked
    assert reply.candidate_extent == policy_pb2.CANDIDATE_EXTENT_DEADLINE


async def test_who_opts_out_is_served_and_marked(server: Running):
    reply = await server.client.generate("hello", options=GenerateOptions(is_excluded=True))
    stored = server.stored(reply.response_id)
    assert stored.learning is Learning.EXCLUDED
    assert (stored.trainable, stored.untrainable_reason) == (False, "learning_excluded")


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"temperature": 0.0}, "greedy"),
        ({"top_p": 0.9}, "truncated_sampling"),
        ({"top_k": 5}, "truncated_sampling"),
        ({"stop": ["zq"]}, "stop_strings"),
    ],
)
async def test_samples_that_are_not_the_policys_own_are_not_trained_on(
    server: Running, sampling: dict[str, Any], reason: str
):
    reply = await server.generate("hello", sampling=policy_pb2.SamplingParams(**sampling))
    stored = server.stored(reply.response_id)
    assert (stored.trainable, stored.untrainable_reason) == (False, reason)
    assert stored.learning is Learning.ALLOWED


async def test_zero_is_a_value_and_absence_takes_the_default(tiny_model: Path, state: State):
    defaults = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.75, "top_k": 7}
    async with running(tiny_model, state, sampling=defaults) as server:
        silent = server.stored((await server.generate("hello")).response_id)
        assert silent.sampling == Sampling(5, 0.5, 0.75, 7, None, ())
        zeros = policy_pb2.SamplingParams(temperature=0, top_k=0, seed=0)
        greedy = server.stored((await server.generate("hi", sampling=zeros)).response_id)
        assert greedy.sampling == Sampling(5, 0.0, 0.75, 0, 0, ())
