"""What Prometheus scrapes: documented families, bounded labels, counts that are right."""

import asyncio
import re
import urllib.request
from collections import defaultdict
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.publishing import FakeSpeaker, Publisher
from tests.refusals import refused
from tests.serving import Running
from thumbloop.config import State, Verdict
from thumbloop.rendering import verdict_tokens
from thumbloop.v1 import feedback_pb2, policy_pb2

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
    "thumbloop_feedback",
    "thumbloop_swaps",
    "thumbloop_published_to_serving_seconds",
    "thumbloop_policy_version",
    "thumbloop_store_queue_changes",
    "thumbloop_store_commit_seconds",
    "thumbloop_requests_in_flight",
}


Samples = dict[str, dict[frozenset[str], float]]
NO_LABELS: frozenset[str] = frozenset()


async def scrape(server: Running) -> Samples:
    """Return sample name -> label values -> value."""
    url = f"http://127.0.0.1:{server.application.metrics_port}/metrics"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()

    samples: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(await asyncio.to_thread(read)):
        for sample in family.samples:
            samples[sample.name][frozenset(sample.labels.values())] = sample.value
    return samples


def families(samples: Samples) -> set[str]:
    return {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in samples}


async def use(server: Running, model: Path, state: State) -> None:
    """Answer, rate, refuse, swap."""
    reply = await server.generate("a secret prompt", user_id="ann@example.org")
    for up in (True, True, False):
        await server.client.rate(reply.response_id, up=up, user_id="ann@example.org")
    await refused(server.generate(""))
    await refused(server.feedback.SubmitFeedback(feedback_pb2.SubmitFeedbackRequest()))
    verdict = verdict_tokens(Verdict(), server.engine.tokenizer)
    speaker = FakeSpeaker(server.engine)
    publisher = Publisher(model, state.versions, server.database, verdict, speaker)
    publisher.publish(1)
    await server.serves(1)
    await server.generate("another secret prompt")
    server.engine.is_too_full_to_score = True
    await server.generate("a third secret prompt")


async def test_all_families_are_there_after_some_use_and_none_is_noise(
    server: Running, tiny_model: Path, state: State
):
    await use(server, tiny_model, state)
    found = families(await scrape(server))
    assert found >= OURS
    assert not [name for name in found if name.endswith("_created")]
    assert {n for n in found if n.startswith(("thumbloop_", "grpc_"))} == OURS


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
        frozenset({"up", "accepted"}): 1,
        frozenset({"up", "duplicate"}): 1,
        frozenset({"down", "accepted"}): 1,
    }
    assert samples["thumbloop_candidates_total"] == {frozenset({"requested", "false"}): 12}
    assert samples["thumbloop_guidance_fallbacks_total"] == {frozenset({"full"}): 1}
    assert samples["thumbloop_pruning_enabled"] == {frozenset({"0.3"}): 1}
    assert samples["thumbloop_policy_version"][NO_LABELS] == 1
    assert samples["thumbloop_swaps_total"] == {frozenset({"current"}): 1}
    assert samples["thumbloop_published_to_serving_seconds_count"][NO_LABELS] == 1
    assert sum(samples["thumbloop_replies_total"].values()) == 3
    assert samples["thumbloop_reward_count"][NO_LABELS] == 1  # version 0 has no opinion
    assert samples["thumbloop_requests_in_flight"][NO_LABELS] == 0
    assert samples["thumbloop_store_commit_seconds_count"][NO_LABELS] >= 5


async def test_a_cancelled_call_is_counted_as_cancelled(server: Running):
    server.engine.may_sample.clear()
    call = server.policy.Generate(policy_pb2.GenerateRequest(text="hello"))
    await server.sampling(4)
    assert (await scrape(server))["thumbloop_requests_in_flight"][NO_LABELS] == 1
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    key = frozenset({"thumbloop.v1.PolicyService", "Generate", "CANCELLED"})
    async with asyncio.timeout(10):
        while (await scrape(server))["grpc_server_handled_total"].get(key) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await scrape(server))["thumbloop_requests_in_flight"][NO_LABELS] == 0


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
