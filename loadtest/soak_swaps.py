"""Many swaps under greedy load: every reply against what its version says alone.

First swap after swap, as fast as the server takes them, with as much load as it can bear: nothing may be mixed then
either. Then swaps that are seconds apart, while fewer people ask as one does, for guided replies: there latencies say
what a swap costs.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.journal import OK, Entry, Journal, People
from loadtest.judge import first_replies, read, told_apart, verdict
from loadtest.midway import Midway
from loadtest.swapping import Swapping
from thumbloop.client import AsyncClient
from thumbloop.config import State
from thumbloop.errors import ThumbloopError
from thumbloop.processes import Process
from thumbloop.types import VersionState

_HURRIED, _CALM = 8, 3
"""Users who ask one request after another, and those who think between."""
_THINK_S = 1.0
_MAX_TOKENS, _MAX_TOKENS_CALM = 16, 64
_PROMPTS = 400
"""Most requests are new to their version, as they are where people ask what they want to know."""
_SHARED = 4
"""Passages that prompts begin with; others share them."""
_LONGEST_CHARACTERS = 1700
_APART_S = 4.0
_SERVES_S = 2.0
_SERVED = (VersionState.CURRENT, VersionState.RETIRED)
_AROUND_S = 0.5
"""A window is a second, and a swap in its middle."""
_RESAMPLED = 2000


async def soak_swaps(
    found: Midway,
    folder: Path,
    *,
    swaps: int,
    requests: int,
    apart: int,
    rollbacks: int,
    seed: int,
) -> dict[str, Any]:
    """Publish copies of a run's versions in turn while users ask: `swaps` in a row, then `apart` with time between,
    then some that an operator takes back.
    """
    state = State(folder=folder / "state")
    process = Process.of_application("server", settings_of(found, state), folder)
    journal, sources = Journal(folder / "journal.jsonl"), {}
    try:
        port, _ = await process.serving_ports()
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            hurried, calm = (
                People(
                    client,
                    journal,
                    prompts_of(found.texts),
                    max_tokens=max_tokens,
                    greedy_share=greedy_share,
                    rates=False,
                    seed=seed,
                )
                for max_tokens, greedy_share in ((_MAX_TOKENS, 1.0), (_MAX_TOKENS_CALM, 0.0))
            )
            with Swapping(state) as swapping:
                for source in found.trained:
                    number = await swapping.to(source)
                    sources[number] = str(source)
                    for prompt in range(_PROMPTS):
                        await hurried.ask(prompt, "solo", is_greedy=True, pin=number)
                turns = Turns(swapping, journal, sources, found.trained)
                async with hurried.present(_HURRIED):
                    while turns.done < swaps or len(journal.of("generate")) < requests:
                        await turns.swap()
                journal.happened("calm begins")
                async with calm.present(_CALM, _THINK_S):
                    for _ in range(apart):
                        await asyncio.sleep(_APART_S)
                        await turns.swap()
                        await hurried.ask(0, "first", is_greedy=True)
                    await asyncio.sleep(_APART_S)
                    journal.happened("calm ends")
                    for _ in range(rollbacks):
                        await turns.swap()
                        await asyncio.sleep(_SERVES_S)
                        await turns.roll_back(client)
    finally:
        process.stop()
        journal.close()
    return describe(journal.entries, sources, state)


@dataclass(slots=True)
class Turns:
    """Swaps to copies of versions in turn, written down."""

    swapping: Swapping
    journal: Journal
    sources: dict[int, str]
    of: tuple[Path, ...]
    done: int = 0

    async def swap(self) -> None:
        """Publish the next, and wait until the server has decided about it."""
        source = self.of[self.done % len(self.of)]
        number = await asyncio.to_thread(self.swapping.publish, source)
        self.sources[number] = str(source)
        self.journal.happened("publish", version=number)
        version = await self.swapping.decided(number)
        self.journal.note(
            Entry(
                "swap", version.state_since, version.state_since, OK, None, {"state": version.state}
            )
        )
        self.done += 1

    async def roll_back(self, client: AsyncClient) -> None:
        """Take the version that was published last back as an operator does, and write down how long that took."""
        number, status, began = max(self.sources), OK, time()
        try:
            await client.roll_back(expected_current=number)
        except ThumbloopError as error:
            status = error.code.name
        self.journal.note(Entry("rollback", began, time(), status, None, {"version": number}))


def settings_of(found: Midway, state: State) -> dict[str, Any]:
    """Return the server's settings."""
    return {
        "state": {"folder": str(state.folder)},
        "model": {"path": str(found.model)},
        "listen": {"port": 0},
        "http": {"enabled": False},
        "metrics": {"port": 0},
        "engine": {"dtype": "float32"},
        "limits": {"max_tokens": 256},
    }


def prompts_of(texts: Sequence[str]) -> list[str]:
    """Return prompts from one line to hundreds of tokens, of which many begin alike."""
    passages = [" ".join(texts[first::_SHARED][:80]) for first in range(_SHARED)]
    lengths = np.linspace(0, _LONGEST_CHARACTERS, _PROMPTS).astype(int)
    return [
        f"{passages[n % _SHARED][: lengths[n]]} {texts[n % len(texts)]}".strip()
        for n in range(_PROMPTS)
    ]


def describe(entries: Sequence[Entry], sources: dict[int, str], state: State) -> dict[str, Any]:
    """Return what is to be reported."""
    calls = [e for e in entries if e.kind == "generate"]
    tokens = [e.what["prompt_tokens"] for e in calls if e.status == OK]
    calm_at = next(e.ended for e in entries if e.kind == "calm begins")
    calm_until = next(e.ended for e in entries if e.kind == "calm ends")
    hurried = [e for e in entries if e.began < calm_at]
    calm = [e for e in entries if calm_at <= e.began < calm_until]
    return verdict(entries, read(state), sources) | {
        "swaps": sum(e.kind == "publish" for e in entries),
        "not_taken": sum(e.kind == "swap" and e.what["state"] not in _SERVED for e in entries),
        "requests": len(calls),
        "failed": sum(e.status != OK for e in calls),
        "alone_failed": sum(e.status != OK for e in entries if e.kind == "solo"),
        "sets_of_weights": len(set(sources.values())),
        "prompts_told_apart": told_apart(entries, sources),
        "prompt_tokens": [min(tokens), max(tokens)],
        "versions_that_answered": len(first_replies(entries)),
        "in_a_row": _described(hurried),
        "apart": _described(calm) | _compared(calm),
        "rollbacks": _described_rollbacks(entries),
    }


def _described_rollbacks(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return how long operators' rollbacks took; every request that began later has to be answered by another version."""
    done = [e for e in entries if e.kind == "rollback" and e.status == OK]
    return {
        "rollbacks": len(done),
        "refused": sum(e.kind == "rollback" for e in entries) - len(done),
        "taken_s": _percentiles([e.ended - e.began for e in done], (50, 100)),
    }


def _described(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return how many swaps and requests there were, and how soon new versions answered."""
    firsts = list(first_replies(entries).values())
    published = sum(e.kind == "publish" for e in entries)
    return {
        "swaps": published,
        "never_answered": published - len(firsts),
        "requests": sum(e.kind == "generate" for e in entries),
        "publish_to_first_reply_s": _percentiles(firsts, (50, 95, 99, 100)),
    }


def _compared(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the latencies of guided replies around swaps beside those half-way between two."""
    near, far = latencies([e for e in entries if e.prompt is None])
    found: dict[str, Any] = {
        "around_swaps": _described_latencies(near),
        "half_way_between": _described_latencies(far),
    }
    if any(near) and any(far):
        rng = np.random.default_rng(0)
        again = [_ratio(_drawn(near, rng), _drawn(far, rng)) for _ in range(_RESAMPLED)]
        found["p99_ratio"] = _ratio(near, far)
        found["p99_ratio_95_percent"] = [float(np.nanpercentile(again, q)) for q in (2.5, 97.5)]
    return {"latency_s": found}


def _described_latencies(windows: Sequence[Sequence[float]]) -> dict[str, Any]:
    taken = [took for window in windows for took in window]
    return {"requests": len(taken)} | _percentiles(taken, (50, 99))


def _drawn(windows: Sequence[Sequence[float]], rng: np.random.Generator) -> list[Sequence[float]]:
    """Return as many windows drawn anew: calls of the same second are not independent."""
    return [windows[n] for n in rng.integers(len(windows), size=len(windows))]


def _ratio(near: Sequence[Sequence[float]], far: Sequence[Sequence[float]]) -> float:
    p99s = [
        np.percentile(np.concatenate(each), 99) if any(each) else np.nan for each in (near, far)
    ]
    return float(p99s[0] / p99s[1])


def _percentiles(
    values: Sequence[float] | NDArray[np.float64], which: Sequence[int]
) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in which} if len(values) else {}


def latencies(entries: Sequence[Entry]) -> tuple[list[list[float]], list[list[float]]]:
    """Return the latencies of calls that began within the second around each swap, and within as long a one
    half-way between two swaps: by when they began, so that long ones are in neither more often.
    """
    swaps = np.array(sorted(e.ended for e in entries if e.kind == "swap"))
    calls = [e for e in entries if e.kind == "generate" and e.status == OK]
    between = (swaps[1:] + swaps[:-1]) / 2
    return _of_windows(calls, swaps), _of_windows(calls, between)


def _of_windows(calls: Sequence[Entry], middles: NDArray[np.float64]) -> list[list[float]]:
    return [
        [e.ended - e.began for e in calls if abs(e.began - middle) <= _AROUND_S]
        for middle in middles
    ]
