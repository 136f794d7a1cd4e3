"""Calling a server in this process over HTTP, and looking at what that left behind."""

import asyncio
import json
import urllib.request
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.engine import Adapter, Sampled
from server.engine.protocol import REPLY_PRIORITY
from tests.fakes import FakeEngine
from tests.serving import Running
from thumbloop.store import feedback, interactions, reading
from thumbloop.types import DEFAULT_POLICY, Sampling, Status

Body = dict[str, Any]

JSON = "application/json"
ASK: Body = {"messages": [{"role": "user", "content": "How was it?"}]}
COMPLETE: Body = {"prompt": "The soup was"}
ONE = {"guidance": {"num_candidates": 1}}
WIRES = [("/v1/chat/completions", ASK), ("/v1/completions", COMPLETE)]

both = pytest.mark.parametrize(("path", "body"), WIRES, ids=["chat", "completions"])


class Halting(FakeEngine):
    """Streams the first token of a response, and the rest when it may go on."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.may_go_on = asyncio.Event()
        self.failure: Exception | None = None

    async def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> AsyncGenerator[Sampled, None]:
        async with aclosing(super().stream(prompt, sampling, adapter, priority=priority)) as parts:
            async for part in parts:
                yield part
                await self.may_go_on.wait()
                if self.failure is not None:
                    raise self.failure
                self._raise_if_unwell(is_full=False)


def web(server: Running) -> httpx2.AsyncClient:
    url = f"http://127.0.0.1:{server.application.http_port}"
    return httpx2.AsyncClient(base_url=url, timeout=30, headers={"content-type": JSON})


def head_of(size_bytes: int) -> bytes:
    """Return the head of a request whose body will have this size."""
    lines = ("POST /v1/completions HTTP/1.1", "host: localhost", f"content-type: {JSON}")
    return "\r\n".join([*lines, f"content-length: {size_bytes}", "", ""]).encode()


def rows(server: Running) -> list[Status]:
    assert server.database is not None
    with reading(server.database) as connection:
        return [row.status for row in interactions.list_since(connection, DEFAULT_POLICY, 0)]


def counts(server: Running) -> tuple[int, int]:
    assert server.database is not None
    with reading(server.database) as connection:
        return feedback.counts(connection)


def events_of(text: str) -> list[Any]:
    """Return the data of a whole stream's events; the last one has to be [DONE]."""
    *events, rest = text.split("\n\n")
    assert rest == ""
    data = [event.removeprefix("data: ") for event in events]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


def piece_of(event: Body) -> str:
    """Return the text in an event of a stream, of either kind of completion."""
    return "".join(c.get("text") or c.get("delta", {}).get("content", "") for c in event["choices"])


async def requests_of(server: Running) -> dict[tuple[str, str], float]:
    """Return what Prometheus scrapes: how many requests of a route had a status."""
    url = f"http://127.0.0.1:{server.application.metrics_port}/metrics"

    def scrape() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    return {
        (sample.labels["route"], sample.labels["code"]): sample.value
        for family in text_string_to_metric_families(await asyncio.to_thread(scrape))
        for sample in family.samples
        if sample.name == "thumbloop_http_requests_total" and sample.value
    }
