"""Ten times as many calls as can be answered: what still is, how late, and how soon the rest is refused."""

from collections.abc import Sequence
from itertools import repeat
from random import Random
from statistics import median

from loadtest.figures import Figure, exactly, of_repeats
from loadtest.report import percentiles_ms
from loadtest.setting import CallsFailed, Setting, calling, ours
from loadtest.workload import Ask, Call, arrivals, open_loop
from thumbloop.types import Strategy

CANDIDATES = 8
TIMES = 10  # capacity
DURATION_S = 30.0
AT_ONCE = 16  # as many best-of-8 calls as the server has in flight at its limit
_CLOSED_CALLS = 160
_KIND = "best_of_n:8"
_REFUSED = "RESOURCE_EXHAUSTED"


async def overload(setting: Setting) -> dict[str, Figure]:
    """Return the figures of a server at its capacity, and far beyond it; best-of-8, open loop."""
    goodput, tail, rejections, candidates = [], [], [], []
    async with ours(setting) as server:
        ask = server.asking(Strategy.BEST_OF_N, CANDIDATES)
        for number in range(setting.repeats):
            first = number * _CLOSED_CALLS
            closed = await calling(ask, AT_ONCE)(range(first, first + _CLOSED_CALLS))
            capacity = closed.requests_per_s
            at_capacity = await _load(ask, capacity, seed=number)
            beyond = await _load(ask, TIMES * capacity, seed=number)
            answered = _answered(beyond)
            goodput.append(len(answered) / _span_s(beyond) / capacity)
            tail.append(_p99_ms(answered) / _p99_ms(_answered(at_capacity)))
            rejections.append(median(_refusals_ms(beyond)))
            candidates += [call.answer.num_candidates for call in answered if call.answer]
    return {
        "overload.goodput_ratio": of_repeats(goodput),
        "overload.p99_ratio": of_repeats(tail),
        "overload.reject_ms_p50": of_repeats(rejections),
        "overload.candidates": exactly(sum(candidates) / len(candidates)),
    }


async def _load(ask: Ask, rate: float, *, seed: int) -> list[Call]:
    """Send calls at this rate. Raises CallsFailed: some were neither answered nor refused."""
    moments = arrivals(rate, DURATION_S, Random(seed))
    calls = await open_loop({_KIND: ask}, moments, repeat(_KIND))
    if odd := {call.status for call in calls} - {"OK", _REFUSED}:
        raise CallsFailed(f"calls ended with {', '.join(sorted(odd))}; see the logs")
    return calls


def _answered(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if call.status == "OK"]


def _refusals_ms(calls: Sequence[Call]) -> list[float]:
    """Return how long each refusal took from when it was sent: the generator's own delay is not it."""
    return [(call.done_s - call.sent_s) * 1000 for call in calls if call.status == _REFUSED]


def _span_s(calls: Sequence[Call]) -> float:
    """Return the time from the first call that was due to the last answer."""
    return max(call.done_s for call in calls) - min(call.due_s for call in calls)


def _p99_ms(calls: Sequence[Call]) -> float:
    return percentiles_ms(call.latency_s for call in calls)["p99"]
