import json
from pathlib import Path

import pytest

from loadtest import report
from loadtest.workload import Answer, Call


def call(kind: str, latency_s: float, *, status: str = "OK", version: int = 3) -> Call:
    answer = Answer(10, 40, policy_version=version) if status == "OK" else None
    return Call(kind, 1.0, 1.001, 1.0 + latency_s, status, answer)


CALLS = [call("a", 0.1 * i) for i in range(1, 11)] + [
    call("b", 0.5, version=4),
    call("b", 9.0, status="UNAVAILABLE"),
]


def test_percentiles_are_those_of_the_answers_in_milliseconds():
    found = report.percentiles_ms([0.001 * i for i in range(1, 1001)])
    assert found["p50"] == pytest.approx(500, rel=0.01)
    assert found["p99"] == pytest.approx(990, rel=0.01)
    assert found["p100"] == pytest.approx(1000, rel=0.01)


def test_no_latency_has_no_percentiles():
    assert report.percentiles_ms([]) == {}


def test_the_summary_counts_answers_failures_and_versions():
    summary = report.summarise(CALLS, rate=6.0, duration_s=2.0)
    assert summary["answered_per_s"] == pytest.approx(5.5)
    assert summary["reply_tokens_per_s"] == pytest.approx(55)
    assert summary["versions"] == {"3": 10, "4": 1}
    assert summary["kinds"]["b"]["statuses"] == {"OK": 1, "UNAVAILABLE": 1}
    assert summary["kinds"]["b"]["latency_ms"]["p100"] == pytest.approx(500, rel=0.01)
    assert summary["late_ms"]["p50"] == pytest.approx(1, rel=0.01)


def test_the_text_names_every_kind_and_what_failed():
    words = report.text(report.summarise(CALLS, rate=6.0, duration_s=2.0))
    assert "b: 2 calls, OK 1, UNAVAILABLE 1" in words
    assert "6 calls per second asked for" in words


def test_the_report_is_written_as_json_histogram_and_plot(tmp_path: Path):
    summary = report.summarise(CALLS, rate=6.0, duration_s=2.0)
    report.write(CALLS, summary, tmp_path / "out")
    assert json.loads((tmp_path / "out/report.json").read_text()) == summary
    assert "Percentile" in (tmp_path / "out/a.hgrm").read_text()
    assert (tmp_path / "out/latency.png").read_bytes().startswith(b"\x89PNG")


def test_a_load_that_got_no_answer_is_reported_too(tmp_path: Path):
    calls = [call("a", 1.0, status="UNAVAILABLE")]
    report.write(calls, report.summarise(calls, 1.0, 1.0), tmp_path)
    assert (tmp_path / "latency.png").is_file()
