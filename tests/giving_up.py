"""Calls that are given up at random moments, and what they may have left behind in this process."""

import asyncio
from pathlib import Path
from random import Random

import grpc

from tests.serving import Running
from thumbloop.v1 import policy_pb2

STRATEGIES = [
    policy_pb2.GUIDANCE_STRATEGY_NONE,
    policy_pb2.GUIDANCE_STRATEGY_BEST_OF_N,
    policy_pb2.GUIDANCE_STRATEGY_SOFT_BEST_OF_N,
    policy_pb2.GUIDANCE_STRATEGY_SPECULATIVE_REJECTION,
]
GIVEN_UP = {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}


def running_tasks() -> set[str]:
    """Return all tasks but those in which gRPC waits for its next call."""
    return {
        task.get_name()
        for task in asyncio.all_tasks()
        if "AioServer" not in task.get_coro().__qualname__
    }


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def fill_pools(server: Running, at_once: int) -> None:
    """Answer as many calls at a time as there will be: what is pooled stays open, and is no leak."""
    await asyncio.gather(*(server.generate("warm up") for _ in range(at_once)))
    await asyncio.gather(*(server.client.versions() for _ in range(at_once)))


async def give_up(
    server: Running, request: policy_pb2.GenerateRequest, longest_s: float, rng: Random
) -> grpc.StatusCode:
    """Make a call, unary or streamed, and cancel it or let it expire; return how it ended."""
    patience_s = rng.uniform(0, longest_s)
    expires = rng.random() < 0.5
    timeout_s = patience_s if expires else None
    call: grpc.aio.Call
    if rng.random() < 0.5:
        call = server.policy.Generate(request, timeout=timeout_s)
    else:
        streamed = policy_pb2.StreamGenerateRequest(request=request)
        call = server.policy.StreamGenerate(streamed, timeout=timeout_s)
    if not expires:
        await asyncio.sleep(patience_s)
        call.cancel()
    return await call.code()
