"""What Prometheus scrapes: documented families, bounded labels, counts that are right."""

import asyncio
import math
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import Gauge
from prometheus_client.parser import text_string_to_metric_families

from server.engine import Sampled
from server.metrics import ServerMetrics
from server.rollout import derive_seed
from tests.fakes import FakeEngine
from tests.prometheus import complaints
from tests.publishing import publisher_of
from tests.refusals import fields, refused
from tests.rows import candidate, interaction
from tests.serving import Running, running, until
from thumbloop.artifacts import Manifest
from thumbloop.config import State
from thumbloop.errors import EngineUnavailable, InvalidRequest, NotFound
from thumbloop.types import FinishReason, Sampling
from thumbloop.v1 import admin_pb2, feedback_pb2, policy_pb2

OURS = {
    "grpc_server_started",
    "grpc_server_handled",
    "grpc_server_handling_seconds",
    "thumbloop_replies",
    "thumbloop_candidates",
    "thumbloop_guidance_fallbacks",
    "thumbloop_pruning_correlation",
    "thumbloop_pruning_enabled",
    "thumbloop_tokens",
    "thumbloop_reward",
    "thumbloop_rerank_seconds",
    "thumbloop_rerank_lift",
    "thumbloop_propensity",
    "thumbloop_given_up",
    "thumbloop_feedback_rejected",
    "thumbloop_last_feedback_timestamp_seconds",
    "thumbloop_feedback_to_serving_seconds",
    "thumbloop_version_thumb_up_ratio",
    "thumbloop_version_promise_ratio",
    "thumbloop_versions_rejected",
    "thumbloop_swap_seconds",
    "thumbloop_store_errors",
    "thumbloop_feedback",
    "thumbloop_swaps",
    "thumbloop_collected_versions",
    "thumbloop_collected_bytes",
    "thumbloop_published_to_serving_seconds",
    "thumbloop_engine_restarts",
    "thumbloop_policy_version",
    "thumbloop_policy_version_info",
    "thumbloop_store_queue_changes",
    "thumbloop_store_unscrubbed",
    "thumbloop_store_commit_seconds",
    "thumbloop_requests_in_flight",
    "thumbloop_candidates_in_flight",
    "thumbloop_candidates_queued",
    "thumbloop_time_to_first_text_seconds",
    "thumbloop_http_requests",
    "thumbloop_http_request_seconds",
}


Samples = dict[str, dict[frozenset[str], float]]
NO_LABELS: frozenset[str] = frozenset()


def read(url: str | urllib.request.Request) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


async def scrape(server: Running) -> Samples:
    """Return sample name -> label values -> value."""
    url = f"http://127.0.0.1:{server.application.metrics_port}/metrics"
    samples: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(await asyncio.to_thread(read, url)):
        for sample in family.samples:
            samples[sample.name][frozenset(sample.labels.values())] = sample.value
    return samples


def sample(server: Running, name: str, **labels: str) -> float | None:
    """Return one value as it is now, without the wire."""
    return server.application._metrics.registry.get_sample_value(name, labels)


def families(samples: Samples) -> set[str]:
    return {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in samples}


def publish(server: Running, model: Path, state: State, **options: Any) -> None:
    publisher_of(server, model, state).publish(1, **options)


async def use(server: Running, model: Path, state: State) -> None:
    """Answer, rate, refuse, swap."""
    reply = await server.generate("a secret prompt", user_id="ann@example.org")
    for number, up in ((1, True), (1, True), (2, False)):
        how = {"user_id": "ann@example.org", "request_id": f"thumb {number}"}
        await server.client.rate(reply.response_id, up=up, **how)
    await refused(server.generate(""))
    await refused(server.feedback.SubmitFeedback(feedback_pb2.SubmitFeedbackRequest()))
    publish(server, model, state)
    await server.serves(1)
    await server.generate("another secret prompt")
    server.engine.is_too_full_to_score = True
    await server.generate("a third secret prompt")


async def test_all_families_are_there_after_some_use_and_none_is_noise(
    server: Running, tiny_model: Path, state: State
):
    await use(server, tiny_model, state)
    assert [text async for text in server.client.stream("hello", is_text=True)]
    models = f"http://127.0.0.1:{server.application.http_port}/v1/models"
    await asyncio.to_thread(read, models)
    found = families(await scrape(server))
    assert found >= OURS
    assert not [name for name in found if name.endswith("_created")]
    assert {n for n in found if n.startswith(("thumbloop_", "grpc_"))} == OURS


async def test_prometheus_own_linter_has_nothing_to_say(
    server: Running, tiny_model: Path, state: State
):
    await use(server, tiny_model, state)
    page = await asyncio.to_thread(
        read, f"http://127.0.0.1:{server.application.metrics_port}/metrics"
    )
    assert complaints(page) == []
    assert complaints(page.replace("thumbloop_feedback_total", "thumbloop_feedback_count"))


async def test_whatever_a_scraper_prefers_vllm_s_names_keep_their_colon(server: Running):
    Gauge("vllm:requests", "As vLLM calls its own.", registry=server.application._metrics.registry)
    url = f"http://127.0.0.1:{server.application.metrics_port}/metrics"
    request = urllib.request.Request(
        url, headers={"accept": "application/openmetrics-text;version=1.0.0"}
    )
    assert "\nvllm:requests 0.0\n" in await asyncio.to_thread(read, request)


async def test_counts_are_right(server: Running, tiny_model: Path, state: State):
    await use(server, tiny_model, state)
    samples = await scrape(server)
    policy, feedback = "thumbloop.v1.PolicyService", "thumbloop.v1.FeedbackService"
    handled = samples["grpc_server_handled_total"]
    assert handled[frozenset({policy, "Generate", "OK"})] == 3
    assert handled[frozenset({policy, "Generate", "INVALID_ARGUMENT"})] == 1
    assert handled[frozenset({feedback, "SubmitFeedback", "OK"})] == 3
    assert handled[frozenset({feedback, "SubmitFeedback", "INVALID_ARGUMENT"})] == 1
    assert samples["grpc_server_started_total"][frozenset({policy, "Generate"})] == 4
    assert samples["grpc_server_handling_seconds_count"][frozenset({policy, "Generate"})] == 4
    assert samples["thumbloop_feedback_total"] == {
        frozenset({"up", "accepted", "current"}): 1,
        frozenset({"up", "duplicate", "current"}): 1,
        frozenset({"down", "accepted", "current"}): 1,
    }
    assert samples["thumbloop_feedback_rejected_total"] == {
        frozenset({"thumb", "invalid_request"}): 1
    }
    assert samples["thumbloop_candidates_total"] == {frozenset({"requested", "false"}): 12}
    assert samples["thumbloop_guidance_fallbacks_total"] == {frozenset({"full"}): 1}
    assert samples["thumbloop_pruning_enabled"] == {frozenset({"0.3"}): 1}
    assert samples["thumbloop_policy_version"][NO_LABELS] == 1
    assert {k: n for k, n in samples["thumbloop_swaps_total"].items() if n} == {
        frozenset({"current"}): 1
    }
    assert {k: n for k, n in samples["thumbloop_swap_seconds_count"].items() if n} == {
        frozenset({"current"}): 1
    }
    assert not sum(samples["thumbloop_versions_rejected_total"].values())
    assert not sum(samples["thumbloop_given_up_total"].values())
    assert samples["thumbloop_published_to_serving_seconds_count"][NO_LABELS] == 1
    assert sum(samples["thumbloop_replies_total"].values()) == 3
    assert samples["thumbloop_reward_count"][NO_LABELS] == 1  # version 0 has no opinion
    assert samples["thumbloop_rerank_lift_count"][NO_LABELS] == 1
    assert samples["thumbloop_rerank_seconds_count"][NO_LABELS] == 1
    assert samples["thumbloop_version_promise_ratio_count"][frozenset({"1"})] == 1
    assert samples["thumbloop_version_thumb_up_ratio_count"][frozenset({"0"})] == 2
    assert samples["thumbloop_version_thumb_up_ratio_sum"][frozenset({"0"})] == 1
    assert 0 <= time.time() - samples["thumbloop_last_feedback_timestamp_seconds"][NO_LABELS] < 60
    assert samples["thumbloop_requests_in_flight"][NO_LABELS] == 0
    assert samples["thumbloop_store_commit_seconds_count"][NO_LABELS] >= 5


async def test_the_digests_of_what_is_served_are_those_of_the_store(
    server: Running, tiny_model: Path, state: State
):
    name = "thumbloop_policy_version_info"
    assert (await scrape(server))[name] == {frozenset({"0", "current", ""}): 1}
    publish(server, tiny_model, state)
    await server.serves(1)
    shown = (
        await server.admin.GetPolicyVersion(admin_pb2.GetPolicyVersionRequest())
    ).policy_version
    stored = server.stored((await server.generate("hello")).response_id)
    assert (stored.policy_digest, stored.reward_digest) == (
        shown.policy_digest,
        shown.reward_digest,
    )
    assert (await scrape(server))[name] == {
        frozenset({"0", "held", ""}): 1,
        frozenset({"1", "current", shown.policy_digest, shown.reward_digest}): 1,
    }


async def test_a_cancelled_call_is_counted_as_cancelled(server: Running):
    server.engine.may_sample.clear()
    call = server.policy.Generate(policy_pb2.GenerateRequest(text="hello"))
    await server.sampling(4)
    assert (await scrape(server))["thumbloop_requests_in_flight"][NO_LABELS] == 1
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await ends_as(server, "Generate", "CANCELLED")
    assert (await scrape(server))["thumbloop_requests_in_flight"][NO_LABELS] == 0


async def ends_as(server: Running, method: str, code: str) -> None:
    """Wait until the only call of this method, and of the server, has ended with this status."""
    async with asyncio.timeout(10):
        while not (ends := (await scrape(server))["grpc_server_handled_total"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert ends == {frozenset({"thumbloop.v1.PolicyService", method, code}): 1}


@pytest.mark.parametrize("timeout_s", [0.1, 1.234])  # which travels as 1.24
async def test_a_call_whose_own_deadline_passed_is_counted_as_late(
    server: Running, timeout_s: float
):
    server.engine.may_sample.clear()
    request = policy_pb2.GenerateRequest(text="hello")
    error = await refused(server.policy.Generate(request, timeout=timeout_s))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await ends_as(server, "Generate", "DEADLINE_EXCEEDED")


async def test_a_stream_that_was_cancelled_long_before_its_deadline_is_not_late(server: Running):
    server.engine.may_sample.clear()
    request = policy_pb2.StreamGenerateRequest(request=policy_pb2.GenerateRequest(text="hello"))
    call = server.policy.StreamGenerate(request, timeout=60)
    await server.sampling(4)
    call.cancel()
    await ends_as(server, "StreamGenerate", "CANCELLED")


async def test_bytes_that_are_no_message_are_counted_as_a_wrong_request(server: Running):
    call = server.channel.unary_unary("/thumbloop.v1.PolicyService/Generate")
    error = await refused(call(b"\xff"))
    assert fields(error) == ["request"]
    key = frozenset({"thumbloop.v1.PolicyService", "Generate", "INVALID_ARGUMENT"})
    assert (await scrape(server))["grpc_server_handled_total"] == {key: 1}


async def test_an_overload_is_counted_with_its_status(server: Running):
    server.engine.is_full = True
    assert (await refused(server.generate("hello"))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (handled,) = (await scrape(server))["grpc_server_handled_total"].items()
    key = frozenset({"thumbloop.v1.PolicyService", "Generate", "RESOURCE_EXHAUSTED"})
    assert handled == (key, 1)


async def test_no_label_depends_on_what_people_write_or_who_they_are(
    server: Running, tiny_model: Path, state: State
):
    await use(server, tiny_model, state)
    before = await scrape(server)
    for i in range(5):
        reply = await server.generate(f"prompt {i}", user_id=f"user{i}", session_id=f"s{i}")
        await server.client.rate(
            reply.response_id, up=True, user_id=f"user{i}", comment=f"c{i}", request_id=f"r{i}"
        )
    await refused(server.generate("hello", policy="x" * 40))
    after = await scrape(server)
    for name in after:
        if not name.startswith(("thumbloop_", "grpc_")):
            continue
        if name.startswith("grpc_"):
            assert all("NOT_FOUND" in new for new in after[name].keys() - before[name].keys())
        shown = {value for labels in after[name] for value in labels}
        assert not {v for v in shown if re.search(r"user|secret|prompt \d|@|x{5}", v)}, name


async def test_time_from_a_thumb_to_the_first_version_that_learned_from_it(
    server: Running, tiny_model: Path, state: State
):
    reply = await server.generate("hello", user_id="ann")
    thumb = await server.client.rate(reply.response_id, up=True, user_id="ann")
    await asyncio.sleep(0.2)
    publish(server, tiny_model, state, new_feedback=(thumb.feedback_id,))
    await server.serves(1)
    name = "thumbloop_feedback_to_serving_seconds"
    await until(lambda: sample(server, f"{name}_count"))
    samples = await scrape(server)
    assert samples[f"{name}_count"][NO_LABELS] == 1
    assert 0.2 < samples[f"{name}_sum"][NO_LABELS] < 60


async def test_a_version_that_is_not_what_was_published_is_counted_by_reason(
    server: Running, tiny_model: Path, state: State
):
    def alter(manifest: Manifest) -> Manifest:
        return manifest.model_copy(update={"version": 7})

    publish(server, tiny_model, state, alter=alter)
    rejected = frozenset({"rejected"})
    await until(lambda: sample(server, "thumbloop_swaps_total", result="rejected"))
    samples = await scrape(server)
    counted = {k: n for k, n in samples["thumbloop_versions_rejected_total"].items() if n}
    assert counted == {frozenset({"wrong_version"}): 1}
    assert samples["thumbloop_swap_seconds_count"][rejected] == 1


async def test_what_comes_to_nothing_is_counted_by_reason(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    speak = server.engine.speak

    def wrong(*arguments: object) -> Sampled:
        sampled = speak(*arguments)
        return replace(sampled, logprobs=(math.nan,) * len(sampled.logprobs))

    monkeypatch.setattr(server.engine, "speak", wrong)
    await refused(server.generate("hello"))
    monkeypatch.undo()
    server.engine.may_sample.clear()
    call = server.policy.Generate(policy_pb2.GenerateRequest(text="hello"))
    await server.sampling(4)
    call.cancel()
    await until(lambda: server.engine.aborted)
    await until(lambda: sample(server, "thumbloop_given_up_total", reason="cancelled"))
    assert (await scrape(server))["thumbloop_given_up_total"] == {
        frozenset({"cancelled"}): 1,
        frozenset({"corrupted"}): 1,
        frozenset({"failed"}): 0,
    }


def test_of_several_rewards_the_one_of_thumbs_promises_some():
    metrics = ServerMetrics()
    value = metrics.registry.get_sample_value
    of_three = {"version": "3"}
    for parts in ({"thumbs": 0.0, "length": -9.0}, {"length": -9.0}, {}):
        shown = candidate(chosen=True, reward=0.0, reward_components=parts)
        metrics.observe_reply(interaction(policy_version=3, candidates=(shown,)))
    assert value("thumbloop_reward_count") == 3
    assert value("thumbloop_version_promise_ratio_count", of_three) == 2
    assert value("thumbloop_version_promise_ratio_sum", of_three) == 1


async def test_refused_feedback_is_counted_by_reason(server: Running):
    reply = await server.generate("hello", user_id="ann")
    for user, response_id in (("bob", reply.response_id), ("ann", "never given")):
        with pytest.raises(NotFound):
            await server.client.rate(response_id, up=True, user_id=user)
    with pytest.raises(InvalidRequest):
        await server.client.prefer(reply.response_id, better=1, worse=1, user_id="ann")
    assert (await scrape(server))["thumbloop_feedback_rejected_total"] == {
        frozenset({"thumb", "unknown_response"}): 2,
        frozenset({"preference", "invalid_request"}): 1,
    }


async def test_the_time_of_the_last_thumb_outlives_a_restart(tiny_model: Path, state: State):
    name = "thumbloop_last_feedback_timestamp_seconds"
    async with running(tiny_model, state) as server:
        assert (await scrape(server))[name][NO_LABELS] == 0
        reply = await server.generate("hello", user_id="ann")
        await server.client.rate(reply.response_id, up=True, user_id="ann")
        given_at = (await scrape(server))[name][NO_LABELS]
        assert abs(time.time() - given_at) < 60
    async with running(tiny_model, state) as server:
        assert (await scrape(server))[name][NO_LABELS] == given_at


async def late(*_arguments: object, **_options: object) -> tuple[float, ...]:
    await asyncio.sleep(30)
    raise AssertionError("nobody waits so long")


async def down(*_arguments: object, **_options: object) -> tuple[float, ...]:
    raise EngineUnavailable("the engine gave up on a score")


async def test_scoring_that_is_late_or_down_costs_no_reply_and_is_counted_by_reason(
    tiny_model: Path, state: State
):
    async with running(tiny_model, state, guidance={"scoring_timeout_s": 0.05}) as server:
        publish(server, tiny_model, state)
        await server.serves(1)
        for answer in (late, down, down):
            server.engine.next_logprobs = answer
            reply = await server.generate("hello", include_candidates=True)
            assert reply.text == server.stored(reply.response_id).chosen.text
            assert not reply.reranked
            assert not any(c.HasField("reward") for c in reply.candidates)
            assert len(reply.candidates) == 4
        counted = (await scrape(server))["thumbloop_guidance_fallbacks_total"]
    assert counted == {frozenset({"late"}): 1, frozenset({"down"}): 2}


TOKENS = 10
LOOK = 3
FINAL = (0.0, 1.0, 2.0, 3.0)  # rewards of candidates 0 to 3 at their end
UNLIKE = (3.0, 0.0, 2.0, 1.0)  # ranks 4 1 3 2 against 1 2 3 4: 1 - 6 * 14 / (4 * 15) = -0.4
ALIKE = (0.0, 1.0, 3.0, 2.0)  # ranks 1 2 4 3: 1 - 6 * 2 / (4 * 15) = 0.8


class Script:
    """Four candidates of ten tokens, each of a letter of its own, with rewards written down."""

    def __init__(self, engine: FakeEngine, seed: int) -> None:
        letters = [engine.tokenizer.encode(x, add_special_tokens=False)[0] for x in "abcd"]
        self._letter_of = {derive_seed(seed, i): letter for i, letter in enumerate(letters)}
        self._letters = letters
        self.partial = FINAL
        engine.speak = self.speak
        engine.reward = self.reward

    def speak(self, _weights: str, _prompt: object, sampling: Sampling, seed: int) -> Sampled:
        tokens = (self._letter_of[seed],) * sampling.max_tokens
        return Sampled(tokens, (-1.0,) * len(tokens), FinishReason.LENGTH)

    def reward(self, read: Sequence[int]) -> float:
        *_, last, _verdict = read
        rewards = self.partial if read.count(last) == LOOK else FINAL
        return rewards[self._letters.index(last)]


async def test_audits_that_contradict_partial_rewards_switch_a_checkpoint_off(
    tiny_model: Path, state: State
):
    guidance = {
        "strategy": "speculative_rejection",
        "audit_share": 1.0,
        "min_audits": 3,
        "checkpoints": [{"at": LOOK / TOKENS, "keep": 0.5}],
    }
    async with running(tiny_model, state, guidance=guidance) as server:
        publish(server, tiny_model, state)
        await server.serves(1)
        script = Script(server.engine, seed=7)
        seen = []
        for partial in (UNLIKE, ALIKE, ALIKE):
            script.partial = partial
            reply = await server.generate(
                "?", sampling=policy_pb2.SamplingParams(seed=7, max_tokens=TOKENS)
            )
            assert reply.reranked
            assert reply.num_candidates == 4
            samples = await scrape(server)
            seen.append(
                (
                    samples["thumbloop_pruning_correlation"][frozenset({"0.3"})],
                    samples["thumbloop_pruning_enabled"][frozenset({"0.3"})],
                )
            )
    assert seen == [
        (pytest.approx(-0.4), 1),  # one audit is too few to decide by
        (pytest.approx(0.2), 1),
        (pytest.approx(0.4), 0),  # (-0.4 + 0.8 + 0.8) / 3, below 0.5
    ]
