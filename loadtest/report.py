"""What a load test found, in text, JSON and a plot: latencies as an HDR histogram, by kind of call."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from hdrh.histogram import HdrHistogram
from matplotlib.figure import Figure

from loadtest.workload import Call

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
_LOWEST_US, _HIGHEST_US, _DIGITS = 1, 3_600_000_000, 3
_TICKS_PER_HALVING = 5


def histogram(latencies_s: Iterable[float]) -> HdrHistogram:
    """Return the latencies, seconds, as a histogram of microseconds, three digits exact."""
    result = HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)
    for latency_s in latencies_s:
        result.record_value(min(max(round(latency_s * 1e6), _LOWEST_US), _HIGHEST_US))
    return result


def percentiles_ms(latencies_s: Iterable[float]) -> dict[str, float]:
    """Return latency percentiles in milliseconds, by name: p50, p90, ...; none of no latency."""
    recorded = histogram(latencies_s)
    if not recorded.get_total_count():
        return {}
    return {f"p{p:g}": round(recorded.get_value_at_percentile(p) / 1000, 3) for p in PERCENTILES}


def summarise(calls: Sequence[Call], rate: float, duration_s: float) -> dict[str, Any]:
    """Return the report of an open loop.

    Latency counts from the moment a call was due. `late_ms` is how far the generator itself fell
    behind: where that is not small, the machine that generates the load is the bottleneck.
    """
    return {
        "asked_per_s": rate,
        "duration_s": duration_s,
        "answered_per_s": sum(c.status == "OK" for c in calls) / duration_s,
        "reply_tokens_per_s": sum(c.answer.reply_tokens for c in calls if c.answer) / duration_s,
        "late_ms": percentiles_ms(c.sent_s - c.due_s for c in calls),
        "versions": dict(
            sorted(Counter(str(c.answer.policy_version) for c in calls if c.answer).items())
        ),
        "kinds": {
            kind: _of_kind([c for c in calls if c.kind == kind])
            for kind in sorted({c.kind for c in calls})
        },
    }


def _of_kind(calls: Sequence[Call]) -> dict[str, Any]:
    return {
        "calls": len(calls),
        "statuses": dict(Counter(c.status for c in calls)),
        "latency_ms": percentiles_ms(c.latency_s for c in calls if c.status == "OK"),
    }


def text(summary: Mapping[str, Any]) -> str:
    """Return the summary for a terminal."""
    lines = [
        f"{summary['asked_per_s']:g} calls per second asked for during"
        f" {summary['duration_s']:g} s, {summary['answered_per_s']:.2f} answered,"
        f" {summary['reply_tokens_per_s']:.0f} reply tokens per second",
        f"answered by version: {_pairs(summary['versions'])}",
        f"sent late, ms: {_pairs(summary['late_ms'])}",
    ]
    for kind, found in summary["kinds"].items():
        lines.append(f"{kind}: {found['calls']} calls, {_pairs(found['statuses'])}")
        lines.append(f"  latency, ms: {_pairs(found['latency_ms'])}")
    return "\n".join(lines)


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def write(calls: Sequence[Call], summary: Mapping[str, Any], folder: Path) -> None:
    """Write report.json, latency.png, and each kind's percentiles as HdrHistogram prints them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    answered = [c for c in calls if c.status == "OK"]
    by_kind = {
        kind: histogram(c.latency_s for c in answered if c.kind == kind)
        for kind in sorted({c.kind for c in answered})
    }
    for kind, recorded in by_kind.items():
        printed = BytesIO()
        recorded.output_percentile_distribution(printed, 1000, _TICKS_PER_HALVING)
        (folder / f"{kind}.hgrm").write_bytes(printed.getvalue())
    plot(by_kind, folder / "latency.png")


def plot(by_kind: Mapping[str, HdrHistogram], path: Path) -> None:
    """Draw latency over percentile, the latter stretched towards 100 as HdrHistogram does."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, recorded in by_kind.items():
        steps = [
            (1 / (1 - item.percentile_level_iterated_to / 100), item.value_iterated_to / 1000)
            for item in recorded.get_percentile_iterator(_TICKS_PER_HALVING)
            if item.percentile_level_iterated_to < 100
        ]
        axes.plot(*zip(*steps, strict=True), label=kind)
    axes.set_xscale("log")
    marks = [p for p in PERCENTILES if p < 100]
    axes.set_xticks([1 / (1 - p / 100) for p in marks], [f"{p:g} %" for p in marks])
    axes.minorticks_off()
    axes.set(xlabel="percentile of calls", ylabel="latency, ms", ylim=(0, None))
    if by_kind:
        axes.legend()
    figure.savefig(path, dpi=120)
