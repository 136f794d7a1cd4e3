"""The soak, short: real processes where they start quickly, the judge's word on what came of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loadtest import soak
from loadtest.journal import OK, Entry
from loadtest.soak_swaps import _compared, latencies, prompts_of

CLEAN = dict.fromkeys(
    ("mixed_replies", "unstored_replies", "lost_thumbs", "thumbs_learned_twice"), 0
)


def call(began: float, took: float, prompt: int | None = None) -> Entry:
    return Entry("generate", began, began + took, OK, prompt, {"version": 1})


def happened(kind: str, at: float) -> Entry:
    return Entry(kind, at, at, OK, None, {})


ONE_SWAP = [happened("publish", 1.4), happened("swap", 2.0)]


@pytest.mark.parametrize(
    ("began", "took", "is_near", "is_far"),
    [
        (1.6, 0.1, True, False),  # within half a second of it
        (0.2, 3.0, True, False),  # it falls into it
        (2.4, 0.1, True, False),
        (0.5, 0.5, False, False),  # nobody knows yet what is being published
        (2.6, 0.1, False, False),  # what shares a beginning is asked anew
        (0.2, 0.1, False, True),
        (3.6, 0.2, False, True),
    ],
)
def test_latencies_around_swaps_are_told_from_those_without(
    began: float, took: float, is_near: bool, is_far: bool
):
    near, far = latencies([*ONE_SWAP, call(began, took)])
    assert (bool(near), bool(far)) == (is_near, is_far)
    assert near + far == pytest.approx([took] * (is_near + is_far))


def test_the_ratio_is_of_guided_replies_with_an_interval():
    slow = [call(1.9, 0.2 + n / 1000) for n in range(100)]
    quick = [call(0.0, 0.1 + n / 1000) for n in range(100)]
    greedy = [call(1.9, 9.0, prompt=0)]
    found = _compared([*ONE_SWAP, *slow, *quick, *greedy])["latency_s"]
    assert found["around_swaps"]["requests"] == found["without"]["requests"] == 100
    assert found["p99_ratio"] == pytest.approx(0.298 / 0.198, rel=0.01)
    low, high = found["p99_ratio_95_percent"]
    assert low <= found["p99_ratio"] <= high
    assert high / low < 1.1


def test_without_requests_there_is_no_ratio():
    assert "p99_ratio" not in _compared(ONE_SWAP)["latency_s"]


def test_prompts_are_short_and_long_and_begin_alike():
    prompts = prompts_of(
        [f"How was film number {n}, and would you see it again?" for n in range(400)]
    )
    assert len(prompts) == len(set(prompts)) == 400
    lengths = sorted(map(len, prompts))
    assert lengths[0] < 60
    assert lengths[-1] > 1500
    assert prompts[-1][:1000] == prompts[-5][:1000] != prompts[-2][:1000]


@pytest.mark.parametrize(
    ("report", "is_clean"),
    [
        ({"swaps": CLEAN | {"failed": 0}, "kills": CLEAN}, True),
        ({"swaps": CLEAN | {"failed": 1}}, False),
        ({"kills": CLEAN | {"lost_thumbs": 1}}, False),
        ({"kills": CLEAN | {"mixed_replies": 2}}, False),
    ],
)
def test_one_wrong_thing_is_enough(report: dict[str, Any], is_clean: bool):
    assert soak.is_clean(report) is is_clean


def test_a_part_leaves_the_others_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def found(parts: list[str], *_arguments: Any, **_options: Any) -> dict[str, Any]:
        return dict.fromkeys(parts, CLEAN)

    monkeypatch.setattr(soak, "soak", found)
    (tmp_path / "report.json").write_text(json.dumps({"swaps": CLEAN | {"swaps": 9}}))
    application = soak.typer.Typer()
    application.command()(soak.main)
    done = CliRunner().invoke(application, ["--part", "kills", "--folder", str(tmp_path)])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {"swaps": CLEAN | {"swaps": 9}, "kills": CLEAN}
    wrong = CliRunner().invoke(application, ["--part", "sweeps", "--folder", str(tmp_path)])
    assert wrong.exit_code == 2
