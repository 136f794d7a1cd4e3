"""kill -9 of vLLM's process under load: everybody hears of it, and another one takes its place."""

import asyncio
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.__main__ import make_engine
from tests.own_numbers import check_numbers
from tests.publishing import Publisher, RealSpeaker
from tests.refusals import refused
from tests.server.test_application import NOT_SERVING, SERVING
from tests.serving import comes_to, running, until
from thumbloop.config import State, Verdict
from thumbloop.rendering import verdict_tokens
from thumbloop.v1 import policy_pb2

ENGINE = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "kv_cache_gib": 0.25}
LONG: dict[str, Any] = {
    "sampling": policy_pb2.SamplingParams(max_tokens=200),
    "guidance": policy_pb2.GuidanceParams(num_candidates=16),  # one may end of itself, not all
}


def engines() -> set[int]:
    """Return the processes that compute; those of other tests' engines, too."""
    children = multiprocessing.active_children()
    return {p.pid for p in children if "EngineCore" in p.name and p.pid is not None}


@pytest.mark.filterwarnings("ignore")  # what vllm's imports and its start have to say of torch
async def test_kill_of_the_engine_is_heard_of_at_once_and_made_good(
    tiny_model: Path, state: State, speaker: RealSpeaker
):
    began, others = time.perf_counter(), engines()
    async with running(
        tiny_model, state, make_engine=make_engine, engine=ENGINE | {"max_rank": 4}
    ) as server:
        cold_start_s = time.perf_counter() - began
        verdict = verdict_tokens(Verdict(), server.engine.tokenizer)
        publisher = Publisher(tiny_model, state.versions, server.database, verdict, speaker)
        await asyncio.to_thread(publisher.publish, 1)
        await until(lambda: server.application._routes.routed == (1, None))
        reply = await server.generate("hello", user_id="ann")
        call = asyncio.create_task(refused(server.generate("hello", **LONG)))
        await asyncio.sleep(0.2)
        assert not call.done()

        (pid,) = engines() - others
        os.kill(pid, signal.SIGKILL)
        died = time.perf_counter()
        for refusal in (await call, await refused(server.generate("hello"))):
            assert refusal.code() is grpc.StatusCode.UNAVAILABLE
        assert time.perf_counter() < died + 2
        await comes_to(NOT_SERVING, server, within_s=2)
        await server.client.rate(reply.response_id, up=True, user_id="ann")

        await comes_to(SERVING, server, within_s=cold_start_s + 10)
        again = await server.generate("hello")
        assert time.perf_counter() - died < cold_start_s + 10
        assert again.policy_version == 1
        folder = state.versions / "default/000001"
        check_numbers(server.stored(again.response_id), folder, speaker, verdict)
