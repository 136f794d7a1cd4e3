"""Ten times as many calls as can be answered: what still is, how late, and how soon the rest is refused."""

from collections.abc import Sequence
from itertools import repeat
from random import Random
from statistics import median
from typing import NamedTuple

from loadtest.figures import Figure, exactly, of_repeats, ratio
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
_ANSWERED, _REFUSED = "OK", "RESOURCE_EXHAUSTED"


class Run(NamedTuple):
    """One repeat: answers per second of the closed loop, calls at that rate, and calls far beyond it."""

    capacity: float
    at_capacity: Sequence[Call]
    beyond: Sequence[Call]


async def overload(setting: Setting) -> dict[str, Figure]:
    """Measure a server at its capacity, and far beyond it; best-of-8, open loop."""
    runs = []
    async with ours(setting) as server:
        ask = server.asking(Strategy.BEST_OF_N, CANDIDATES)
        for number in range(setting.repeats):
            first = number * _CLOSED_CALLS
            closed = await calling(ask, AT_ONCE)(range(first, first + _CLOSED_CALLS))
            capacity = closed.requests_per_s
            at_capacity = await _load(ask, capacity, seed=number)
            beyond = await _load(ask, TIMES * capacity, seed=number)
            runs.append(Run(capacity, at_capacity, beyond))
    return describe_overload(runs)


async def _load(ask: Ask, rate: float, *, seed: int) -> list[Call]:
    moments = arrivals(rate, DURATION_S, Random(seed))
    return await open_loop({_KIND: ask}, moments, repeat(_KIND))


def describe_overload(runs: Sequence[Run]) -> dict[str, Figure]:
    """Return the figures of overload, repeat by repeat.

    Raises CallsFailed: calls were neither answered nor refused, or none of a load was answered, or none
    beyond capacity refused.
    """
    calls = [call for run in runs for call in (*run.at_capacity, *run.beyond)]
    if odd := {call.status for call in calls} - {_ANSWERED, _REFUSED}:
        raise CallsFailed(f"calls ended with {', '.join(sorted(odd))}; see the logs")
    answers = [call.answer for run in runs for call in _answered(run.beyond) if call.answer]
    return {
        "overload.goodput_ratio": ratio(
            [_goodput(run.beyond) for run in runs], [run.capacity for run in runs]
        ),
        "overload.p99_ratio": ratio(
            [_p99_ms(run.beyond) for run in runs], [_p99_ms(run.at_capacity) for run in runs]
        ),
        "overload.reject_ms_p50": of_repeats([_reject_ms(run.beyond) for run in runs]),
        "overload.candidates": exactly(sum(a.num_candidates for a in answers) / len(answers)),
    }


def _answered(calls: Sequence[Call]) -> list[Call]:
    answered = [call for call in calls if call.status == _ANSWERED]
    if not answered:
        raise CallsFailed(f"none of {len(calls)} calls was answered; see the logs")
    return answered


def _goodput(calls: Sequence[Call]) -> float:
    """Return answers per second, from the first call that was due to the end of the last one."""
    span_s = max(call.done_s for call in calls) - min(call.due_s for call in calls)
    return len(_answered(calls)) / span_s


def _p99_ms(calls: Sequence[Call]) -> float:
    return percentiles_ms(call.latency_s for call in _answered(calls))["p99"]


def _reject_ms(calls: Sequence[Call]) -> float:
    """Return the median time to refuse, from when calls were sent: the generator's own delay is not it."""
    refused = [call for call in calls if call.status == _REFUSED]
    if not refused:
        raise CallsFailed(f"none of {len(calls)} calls was refused: this was no overload")
    return median((call.done_s - call.sent_s) * 1000 for call in refused)
