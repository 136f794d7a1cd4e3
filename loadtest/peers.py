"""What others offer for the same job: vLLM's own servers, and rerankers wired by hand on top of them.

They run stock: none of our operators, executors or settings beyond what vLLM's flags offer.
"""

import asyncio
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.workload import Answer
from thumbloop.processes import Process
from thumbloop.rendering import VerdictTokens

POLICY = "policy"
REWARD = "reward"
_MAX_RANK = 16
_POLL_S = 0.2

TUNED = (
    *("--block-size", "32", "--max-num-seqs", "128", "--generation-config", "vllm"),
    *("--no-enable-log-requests", "--disable-uvicorn-access-log", "--disable-log-stats"),
)
"""Flags that make vLLM's server quick on this job; its defaults are a peer of their own."""


def adapters(version: Path) -> tuple[str, ...]:
    """Return the flags that serve a version's two adapters."""
    return (
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", str(_MAX_RANK)),
        *("--lora-modules", f"{POLICY}={version / POLICY}", f"{REWARD}={version / REWARD}"),
    )


class VllmServer:
    """vLLM's OpenAI-compatible server, as a process, on a free port of loopback."""

    def __init__(
        self, name: str, model: Path, dtype: str, folder: Path, flags: Sequence[str] = ()
    ) -> None:
        self.port = free_port()
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--served-model-name", "base", "--dtype", dtype),
            *("--host", "127.0.0.1", "--port", str(self.port), *flags),
        ]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": ""}
        self.process = Process(name, command, folder, environment=environment)

    async def ready(self, session: aiohttp.ClientSession) -> None:
        """Wait until it answers. Raises ProcessFailed: it ended before."""
        while True:
            self.process.check()
            try:
                async with session.get(self.url("/health")) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # it does not listen yet
            await asyncio.sleep(_POLL_S)

    def url(self, path: str) -> str:
        """Return the address of a path."""
        return f"http://127.0.0.1:{self.port}{path}"

    def stop(self) -> None:
        """Stop it."""
        self.process.stop()


class Completions:
    """Plain completions of one vLLM server."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        server: VllmServer,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        model: str = "base",
    ) -> None:
        self._session = session
        self._server = server
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._model = model

    async def plain(self, number: int) -> Answer:
        """Ask for one reply."""
        (reply,) = await self.replies(self.prompt(number), 1)
        return Answer(reply_tokens=len(reply), decoded_tokens=len(reply))

    def prompt(self, number: int) -> list[int]:
        """Return the prompt of this number, token ids."""
        return list(self._prompts[number % len(self._prompts)])

    async def replies(self, prompt: list[int], n: int) -> list[list[int]]:
        """Sample n replies, token ids."""
        answer = await post(
            self._session,
            self._server.url("/v1/completions"),
            {
                "model": self._model,
                "prompt": prompt,
                "n": n,
                "max_tokens": self._max_tokens,
                "temperature": 1.0,
                "return_token_ids": True,
            },
        )
        return [choice["token_ids"] for choice in answer["choices"]]


class OneServerReranker:
    """Best-of-n by hand: one vLLM server with both adapters; the client samples, scores and picks."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        server: VllmServer,
        policy: Completions,
        verdict: VerdictTokens,
    ) -> None:
        self._session = session
        self._server = server
        self._policy = policy
        self._verdict = verdict

    async def best_of(self, number: int, n: int) -> Answer:
        """Answer with the best of n."""
        prompt = self._policy.prompt(number)
        replies = await self._policy.replies(prompt, n)
        up, down = self._verdict.up, self._verdict.down
        answer = await post(
            self._session,
            self._server.url("/v1/completions"),
            {
                "model": REWARD,
                "prompt": [self._verdict.wrap(prompt, reply) for reply in replies],
                "max_tokens": 1,
                "logprobs": 1,
                "logprob_token_ids": [up, down],
                "return_tokens_as_token_ids": True,
            },
        )
        in_order = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        tops = [choice["logprobs"]["top_logprobs"][0] for choice in in_order]
        return picked(replies, [t[f"token_id:{up}"] - t[f"token_id:{down}"] for t in tops])


class TwoServerReranker:
    """Best-of-n by hand: a second vLLM server classifies what the first one wrote."""

    def __init__(
        self, session: aiohttp.ClientSession, policy: Completions, classifier: VllmServer
    ) -> None:
        self._session = session
        self._policy = policy
        self._classifier = classifier

    async def best_of(self, number: int, n: int) -> Answer:
        """Answer with the best of n."""
        prompt = self._policy.prompt(number)
        replies = await self._policy.replies(prompt, n)
        answer = await post(
            self._session,
            self._classifier.url("/classify"),
            {"model": "base", "input": [[*prompt, *reply] for reply in replies]},
        )
        in_order = sorted(answer["data"], key=lambda scored: int(scored["index"]))
        return picked(replies, [scored["probs"][-1] for scored in in_order])


def picked(replies: Sequence[Sequence[int]], rewards: Sequence[float]) -> Answer:
    """Return the answer that shows the reply of the highest reward."""
    best = max(range(len(replies)), key=lambda i: rewards[i])
    return Answer(
        reply_tokens=len(replies[best]),
        decoded_tokens=sum(map(len, replies)),
        reward=rewards[best],
        candidate_rewards=tuple(rewards),
        num_candidates=len(replies),
    )


async def post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Post JSON, return JSON. Raises aiohttp.ClientResponseError: anything but 200."""
    async with session.post(url, json=body) as response:
        response.raise_for_status()
        answer: dict[str, Any] = await response.json()
        return answer


def free_port() -> int:
    """Return a port of loopback that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
