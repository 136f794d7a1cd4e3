"""Many swaps under greedy load: every reply against what its version says alone."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.journal import OK, Entry, Journal, People
from loadtest.judge import first_replies, read, verdict
from loadtest.midway import Midway
from loadtest.swapping import Swapping
from thumbloop.client import AsyncClient
from thumbloop.config import State
from thumbloop.processes import Process

_USERS = 8
_MAX_TOKENS = 16
_PROMPTS = 40
_SHARED = 4
"""Passages that prompts begin with; others share them."""
_LONGEST_CHARACTERS = 1900
_BLOCK = 25
"""Swaps in a row; as long without any follows."""
_AROUND_S = 0.5


async def soak_swaps(
    found: Midway, folder: Path, *, swaps: int, requests: int, seed: int
) -> dict[str, Any]:
    """Publish copies of two versions in turn while users ask, with quiet stretches between for comparison."""
    state = State(folder=folder / "state")
    process = Process.of_application("server", settings_of(found, state), folder)
    journal, sources = Journal(folder / "journal.jsonl"), {}
    try:
        port, _ = await process.serving_ports()
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            people = People(
                client,
                journal,
                prompts_of(found.texts),
                max_tokens=_MAX_TOKENS,
                greedy_share=1.0,
                rates=False,
                seed=seed,
            )
            with Swapping(state) as swapping:
                for source in (found.version, found.other):
                    number = await swapping.to(source)
                    sources[number] = str(source)
                    for prompt in range(_PROMPTS):
                        await people.ask(prompt, "solo", is_greedy=True, pin=number)
                leaving = asyncio.Event()
                users = [asyncio.create_task(people.use(n, leaving)) for n in range(_USERS)]
                try:
                    await _swap(swapping, journal, sources, found, swaps, requests)
                finally:
                    leaving.set()
                    await asyncio.gather(*users)
    finally:
        process.stop()
        journal.close()
    return describe(journal.entries, sources, state)


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


async def _swap(
    swapping: Swapping,
    journal: Journal,
    sources: dict[int, str],
    found: Midway,
    swaps: int,
    requests: int,
) -> None:
    """Swap in blocks; after each, users are left alone for as long."""
    loop = asyncio.get_running_loop()
    done = 0
    while done < swaps or len(journal.of("generate")) < requests:
        began = loop.time()
        journal.happened("swaps begin")
        for _ in range(min(_BLOCK, max(swaps - done, 1))):
            source = (found.version, found.other)[done % 2]
            number = await asyncio.to_thread(swapping.publish, source)
            sources[number] = str(source)
            journal.happened("publish", version=number)
            version = await swapping.decided(number)
            journal.note(Entry("swap", version.state_since, version.state_since, OK, None, {}))
            done += 1
        journal.happened("swaps end")
        await asyncio.sleep(loop.time() - began)


def describe(entries: Sequence[Entry], sources: dict[int, str], state: State) -> dict[str, Any]:
    """Return what is to be reported."""
    calls = [e for e in entries if e.kind == "generate"]
    tokens = [e.what["prompt_tokens"] for e in calls if e.status == OK]
    firsts = list(first_replies(entries).values())
    near, far = _latencies(entries)
    return verdict(entries, read(state), sources) | {
        "swaps": sum(e.kind == "publish" for e in entries),
        "requests": len(calls),
        "failed": sum(e.status != OK for e in calls),
        "prompt_tokens": [min(tokens), max(tokens)],
        "versions_that_answered": len(firsts),
        "publish_to_first_reply_s": {
            f"p{q}": float(np.percentile(firsts, q)) for q in (50, 95, 99, 100)
        },
        "latency_s": {
            "around_swaps": {f"p{q}": float(np.percentile(near, q)) for q in (50, 99)},
            "without": {f"p{q}": float(np.percentile(far, q)) for q in (50, 99)},
            "p99_ratio": float(np.percentile(near, 99) / np.percentile(far, 99)),
        },
    }


def _latencies(entries: Sequence[Entry]) -> tuple[list[float], list[float]]:
    """Return latencies of calls within a second around a swap, and of those in quiet stretches."""
    swaps = np.array(sorted(e.ended for e in entries if e.kind == "swap"))
    quiet = _stretches(entries, "swaps end", "swaps begin")
    near, far = [], []
    for entry in entries:
        if entry.kind != "generate" or entry.status != OK:
            continue
        at = int(np.searchsorted(swaps, entry.began - _AROUND_S))
        if at < len(swaps) and swaps[at] <= entry.ended + _AROUND_S:
            near.append(entry.ended - entry.began)
        elif any(begin + _AROUND_S < entry.began < end for begin, end in quiet):
            far.append(entry.ended - entry.began)
    return near, far


def _stretches(entries: Sequence[Entry], begin: str, end: str) -> list[tuple[float, float]]:
    """Return the times between happenings of two kinds; the last lasts as long as the journal."""
    last = max(e.ended for e in entries)
    begins = [e.ended for e in entries if e.kind == begin]
    ends = [e.ended for e in entries if e.kind == end]
    return [(at, min((e for e in ends if e > at), default=last)) for at in begins]
