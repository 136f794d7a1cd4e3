"""PolicyService over the wire: what is answered, what is stored, what is refused."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from server.engine import BACKGROUND_PRIORITY, REPLY_PRIORITY, Adapter
from server.engine.protocol import PROBE_PRIORITY
from server.guidance import Choice, find_strategies
from server.pipeline import Request
from server.rollout import derive_seed
from tests.fakes import FakeEngine
from tests.publishing import FakeSpeaker, Publisher
from tests.refusals import detail_of, fields, refused
from tests.serving import Running, running, until
from thumbloop.client import GenerateOptions
from thumbloop.config import State, Verdict
from thumbloop.rendering import verdict_tokens
from thumbloop.store import interactions, reading
from thumbloop.types import (
    DEFAULT_POLICY,
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

NAN, INF = float("nan"), float("inf")


@pytest.fixture
async def taught(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A server whose current version is 1, so that there is a reward model."""
    async with running(tiny_model, state) as server:
        publisher_of(server, tiny_model, state).publish(1)
        await server.serves(1)
        yield server


def publisher_of(server: Running, model: Path, state: State) -> Publisher:
    verdict = verdict_tokens(Verdict(), server.engine.tokenizer)
    return Publisher(model, state.versions, server.database, verdict, FakeSpeaker(server.engine))


def rows(server: Running) -> int:
    assert server.database is not None
    with reading(server.database) as connection:
        return len(interactions.list_since(connection, DEFAULT_POLICY, 0))


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
    taught.engine.reward = lambda _tokens: NAN
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


async def test_a_pinned_request_is_answered_by_that_version(taught: Running):
    for number in (0, 1):
        reply = await taught.generate("hello", policy_version=number)
        assert reply.policy_version == number
        assert taught.stored(reply.response_id).policy_version == number
    unknown = await refused(taught.generate("hello", policy_version=7))
    assert unknown.code() is grpc.StatusCode.NOT_FOUND
    assert "available: 0, 1" in unknown.details()


async def test_a_pin_to_a_version_that_was_unloaded_is_a_failed_precondition(
    tiny_model: Path, state: State
):
    async with running(tiny_model, state, engine={"max_versions": 3}) as server:
        publisher = publisher_of(server, tiny_model, state)
        publisher.publish(1)
        await server.serves(1)
        await until(lambda: len(server.engine.loaded) == 2)
        error = await refused(server.generate("hello", policy_version=0))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "not loaded; available: 1" in error.details()


async def test_a_swap_in_the_middle_leaves_a_request_on_the_version_it_began_with(
    tiny_model: Path, state: State
):
    async with running(tiny_model, state) as server:
        publisher = publisher_of(server, tiny_model, state)
        server.engine.may_sample.clear()
        call = asyncio.create_task(server.generate("hello"))
        await server.sampling(4)
        publisher.publish(1)
        await server.sampling(5)  # a probe waits too
        server.engine.may_sample.set()
        assert (await call).policy_version == 0
        await server.serves(1)
        assert (await server.generate("hello")).policy_version == 1


class Raters:
    """Rewards of replies that are one number; the next one may be held back. Probes are the engine's own."""

    def __init__(self, engine: FakeEngine) -> None:
        self.reward = 1.0
        self.by: list[str] = []
        self.is_asked, self.may_answer = asyncio.Event(), asyncio.Event()
        self.may_answer.set()
        self._engines = engine.next_logprobs
        engine.next_logprobs = self._answer  # type: ignore[method-assign]

    async def _answer(
        self, prompt: Sequence[int], tokens: Sequence[int], adapter: Adapter, *, priority: int
    ) -> tuple[float, ...]:
        numbers = await self._engines(prompt, tokens, adapter, priority=priority)
        if priority == PROBE_PRIORITY:
            return numbers
        self.by.append(adapter.name)
        reward = self.reward
        self.is_asked.set()
        await self.may_answer.wait()
        return reward, 0.0


async def test_a_swap_between_two_waves_leaves_both_and_their_scores_on_the_version_they_began_with(
    tiny_model: Path, state: State
):
    guidance = {"first_wave": 2, "min_audits": 2, "audit_share": 0.5}
    async with running(tiny_model, state, guidance=guidance) as server:
        publisher, raters = publisher_of(server, tiny_model, state), Raters(server.engine)
        row = publisher.publish(1)
        await server.serves(1)
        for seed in range(100):  # until audits have said what is good
            sampling = policy_pb2.SamplingParams(seed=seed)
            reply = await server.generate("hello", sampling=sampling)
            if reply.candidate_extent == policy_pb2.CANDIDATE_EXTENT_ENOUGH:
                break
        sampled, raters.reward = server.engine.sampled_under, -1.0
        for seen in (sampled, raters.by, raters.is_asked, raters.may_answer):
            seen.clear()
        call = asyncio.create_task(server.generate("hello", sampling=sampling))
        await raters.is_asked.wait()
        assert dict(sampled) == {"default-000001-policy": 2}
        publisher.publish(2, 1)
        await server.serves(2)
        raters.may_answer.set()
        reply = await call
        stored = server.stored(reply.response_id)
    assert sampled["default-000001-policy"] == 4
    assert raters.by == ["default-000001-reward"] * 4
    assert (reply.policy_version, reply.num_candidates) == (1, 4)
    assert {(c.policy_version, c.reward) for c in stored.candidates} == {(1, -1.0)}
    assert (stored.policy_digest, stored.reward_digest) == (row.policy_digest, row.reward_digest)


BAD_REQUESTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no prompt": ({}, ["prompt"]),
    "an empty text": ({"text": ""}, ["text"]),
    "a blank text": ({"text": " \n\t"}, ["text"]),
    "an empty conversation": ({"chat": {}}, ["chat.messages"]),
    "a turn without a role": (
        {"chat": {"messages": [{"content": "hi"}]}},
        ["chat.messages[0].role"],
    ),
    "a turn without words": (
        {"chat": {"messages": [{"role": "ROLE_USER", "content": " "}]}},
        ["chat.messages[0].content"],
    ),
    "a system turn without words": (
        {"chat": {"messages": [{"role": "ROLE_SYSTEM"}, {"role": "ROLE_USER", "content": "hi"}]}},
        ["chat.messages[0].content"],
    ),
    "an assistant's last turn": (
        {"chat": {"messages": [{"role": "ROLE_ASSISTANT", "content": "hi"}]}},
        ["chat.messages[0].role"],
    ),
    "too many characters": ({"text": "x" * 200_001}, ["text"]),
    "too many tokens": ({"text": "x y " * 400}, ["prompt"]),
    "no room for the reply": ({"text": "hi", "sampling": {"max_tokens": 1000}}, ["prompt"]),
    "no candidates": (
        {"text": "hi", "guidance": {"num_candidates": 0}},
        ["guidance.num_candidates"],
    ),
    "too many candidates": (
        {"text": "hi", "guidance": {"num_candidates": 17}},
        ["guidance.num_candidates"],
    ),
    "guidance temperature 0": (
        {"text": "hi", "guidance": {"temperature": 0}},
        ["guidance.temperature"],
    ),
    "guidance temperature NaN": (
        {"text": "hi", "guidance": {"temperature": NAN}},
        ["guidance.temperature"],
    ),
    "a strategy by a name that is not served": (
        {"text": "hi", "guidance": {"strategy_name": "worst_of_n"}},
        ["guidance.strategy_name"],
    ),
    "a strategy named twice": (
        {
            "text": "hi",
            "guidance": {
                "strategy_name": "best_of_n",
                "strategy": "GUIDANCE_STRATEGY_BEST_OF_N",
            },
        },
        ["guidance.strategy"],
    ),
    "a strategy by a long name": (
        {"text": "hi", "guidance": {"strategy_name": "n" * 33}},
        ["guidance.strategy_name", "guidance.strategy_name"],
    ),
    "an unknown strategy": ({"text": "hi", "guidance": {"strategy": 99}}, ["guidance.strategy"]),
    "no tokens": ({"text": "hi", "sampling": {"max_tokens": 0}}, ["sampling.max_tokens"]),
    "too many tokens asked": (
        {"text": "hi", "sampling": {"max_tokens": 2**32 - 1}},
        ["sampling.max_tokens"],
    ),
    "temperature NaN": ({"text": "hi", "sampling": {"temperature": NAN}}, ["sampling.temperature"]),
    "temperature infinite": (
        {"text": "hi", "sampling": {"temperature": INF}},
        ["sampling.temperature"],
    ),
    "temperature below 0": (
        {"text": "hi", "sampling": {"temperature": -1}},
        ["sampling.temperature"],
    ),
    "temperature above 2": (
        {"text": "hi", "sampling": {"temperature": 2.01}},
        ["sampling.temperature"],
    ),
    "temperature nearly 0": (
        {"text": "hi", "sampling": {"temperature": 1e-5}},
        ["sampling.temperature"],
    ),
    "top_p NaN": ({"text": "hi", "sampling": {"top_p": NAN}}, ["sampling.top_p"]),
    "top_p 0": ({"text": "hi", "sampling": {"top_p": 0}}, ["sampling.top_p"]),
    "top_p above 1": ({"text": "hi", "sampling": {"top_p": 1.5}}, ["sampling.top_p"]),
    "top_k beyond all": ({"text": "hi", "sampling": {"top_k": 2_000_000}}, ["sampling.top_k"]),
    "too many stops": ({"text": "hi", "sampling": {"stop": ["a"] * 9}}, ["sampling.stop"]),
    "an empty stop": ({"text": "hi", "sampling": {"stop": ["a", ""]}}, ["sampling.stop[1]"]),
    "a long stop": ({"text": "hi", "sampling": {"stop": ["a" * 129]}}, ["sampling.stop[0]"]),
    "a long user id": ({"text": "hi", "user_id": "u" * 257}, ["user_id"]),
    "a long session id": ({"text": "hi", "session_id": "u" * 257}, ["session_id"]),
    "a long request id": ({"text": "hi", "request_id": "u" * 129}, ["request_id"]),
    "unknown learning": ({"text": "hi", "learning": 9}, ["learning"]),
    "a version below 0": ({"text": "hi", "policy_version": -1}, ["policy_version"]),
    "several at once": (
        {
            "text": "",
            "user_id": "u" * 300,
            "sampling": {"temperature": NAN, "top_p": 7},
            "guidance": {"num_candidates": 0},
        },
        [
            "text",
            "sampling.temperature",
            "sampling.top_p",
            "guidance.num_candidates",
            "user_id",
        ],
    ),
}


async def test_whatever_is_wrong_with_a_request_is_named_field_by_field(server: Running):
    wrong = {}
    for name, (request, expected) in BAD_REQUESTS.items():
        error = await refused(server.policy.Generate(policy_pb2.GenerateRequest(**request)))
        found = fields(error)
        if found != expected:
            wrong[name] = found
    assert wrong == {}
    assert server.engine.started == 0
    assert rows(server) == 0


async def test_the_longest_prompt_that_fits_is_answered(server: Running):
    room = server.engine.max_model_len - 16 - 2  # the reply, the question, the verdict
    longest = "ab" * (room // 2)
    ids = len(server.engine.tokenizer.encode(longest))
    longest += "z" * (room - ids)
    assert len(server.engine.tokenizer.encode(longest)) == room
    assert (await server.generate(longest)).usage.prompt_tokens == room
    assert fields(await refused(server.generate(longest + "z"))) == ["prompt"]


async def test_a_message_beyond_the_limit_is_refused_by_grpc_itself(tiny_model: Path, state: State):
    """In its own words and without RetryInfo: a retry would not help."""
    async with running(tiny_model, state, listen={"max_message_bytes": 20_000}) as server:
        empty = policy_pb2.GenerateRequest(text="hi", user_id="x" * 1000).ByteSize() - 1000
        longest = "x" * (20_000 - empty - 1)  # its length takes a byte more to say
        assert policy_pb2.GenerateRequest(text="hi", user_id=longest).ByteSize() == 20_000
        assert fields(await refused(server.generate("hi", user_id=longest))) == ["user_id"]
        error = await refused(server.generate("hi", user_id=longest + "x"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max (20001 vs. 20000)" in (error.details() or "")
        assert rpc_status.from_call(error) is None


async def test_another_policy_is_not_found(server: Running):
    assert (await server.generate("hello", policy="default")).text
    error = await refused(server.generate("hello", policy="another"))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_too_many_calls_at_once_are_told_when_to_come_again(tiny_model: Path, state: State):
    async with running(tiny_model, state, limits={"max_requests_in_flight": 2}) as server:
        server.engine.may_sample.clear()
        inside = [asyncio.create_task(server.generate("hello")) for _ in range(2)]
        await server.sampling(8)
        error = await refused(server.generate("one too many"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        delay = detail_of(error, error_details_pb2.RetryInfo).retry_delay
        assert delay.ToMilliseconds() == 500
        server.engine.may_sample.set()
        await asyncio.gather(*inside)
        assert (await server.generate("again")).text


async def test_a_full_engine_queue_says_so(server: Running):
    server.engine.is_full = True
    error = await refused(server.generate("hello"))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail_of(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 250
    assert rows(server) == 0


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_call_that_is_given_up_stops_its_samples_and_its_row_says_so(
    server: Running, how: str
):
    server.engine.may_sample.clear()
    request = policy_pb2.GenerateRequest(text="hello")
    call = server.policy.Generate(request, timeout=0.5 if how == "deadline" else None)
    await server.sampling(4)
    if how == "cancel":
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    else:
        assert (await refused(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: server.engine.aborted == 4)
    server.engine.may_sample.set()
    assert (await server.generate("next")).text
    assert rows(server) == 2
    with reading(server.database) as connection:
        given_up, _ = interactions.list_since(connection, DEFAULT_POLICY, 0)
    assert (given_up.status, given_up.untrainable_reason) == (Status.CANCELLED, "cancelled")
    assert not given_up.trainable
    assert given_up.candidates == ()


async def test_an_unexpected_error_is_internal_and_tells_nothing(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("the secret path /etc/passwd")

    monkeypatch.setattr(FakeEngine, "speak", fail)
    error = await refused(server.generate("hello"))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "internal error; the server's log has the cause"
    assert rpc_status.from_call(error) is None
    assert "the secret path" in caplog.text


async def test_a_reply_whose_row_cannot_be_written_is_not_given(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    from sqlalchemy.exc import OperationalError

    def fail(*_arguments: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("disk full"))

    monkeypatch.setattr(interactions, "append", fail)
    error = await refused(server.generate("hello"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "disk full" in error.details()


async def test_a_row_is_durable_before_the_reply_leaves(server: Running):
    replies = await asyncio.gather(*(server.generate(f"hello {i}") for i in range(20)))
    for reply in replies:
        assert server.stored(reply.response_id).chosen.text == reply.text


@pytest.mark.parametrize("strategy", ["none", "best_of_n", "speculative_rejection"])
async def test_what_nobody_waits_for_is_sampled_after_everything_else(
    taught: Running, monkeypatch: pytest.MonkeyPatch, strategy: str
):
    asked: set[int] = set()

    def spy_on(name: str) -> None:
        call = getattr(FakeEngine, name)

        def spy(engine: FakeEngine, *arguments: Any, priority: int) -> Any:
            asked.add(priority)
            return call(engine, *arguments, priority=priority)

        monkeypatch.setattr(FakeEngine, name, spy)

    spy_on("sample")
    spy_on("stream")
    spy_on("next_logprobs")
    expected = {
        policy_pb2.PRIORITY_UNSPECIFIED: REPLY_PRIORITY,
        policy_pb2.PRIORITY_INTERACTIVE: REPLY_PRIORITY,
        policy_pb2.PRIORITY_BACKGROUND: BACKGROUND_PRIORITY,
    }
    for priority, of_engine in expected.items():
        asked.clear()
        guidance = policy_pb2.GuidanceParams(strategy_name=strategy)
        await taught.generate("hello", priority=priority, guidance=guidance)
        assert asked == {of_engine}
    error = await refused(taught.generate("hello", priority=9))
    assert fields(error) == ["priority"]
