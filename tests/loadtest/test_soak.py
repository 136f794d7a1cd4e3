"""The soak, short: real processes where they start quickly, the judge's word on what came of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loadtest import soak
from loadtest.journal import OK, Entry
from loadtest.soak_swaps import _latencies, prompts_of

CLEAN = dict.fromkeys(
    ("mixed_replies", "unstored_replies", "lost_thumbs", "thumbs_learned_twice"), 0
)


def call(began: float, took: float) -> Entry:
    return Entry("generate", began, began + took, OK, 0, {"version": 1})


def test_latencies_around_swaps_are_told_from_those_without():
    entries = [
        Entry("swaps begin", 0.0, 0.0, OK, None, {}),
        Entry("swap", 2.0, 2.0, OK, None, {}),
        call(1.6, 0.1),  # within half a second of it
        call(0.2, 3.0),  # it falls into it
        call(0.2, 0.1),  # neither near to it nor in a quiet stretch
        Entry("swaps end", 3.0, 3.0, OK, None, {}),
        call(3.2, 0.2),  # the stretch has hardly begun
        call(4.0, 0.3),
    ]
    near, far = _latencies(entries)
    assert near == pytest.approx([0.1, 3.0])
    assert far == pytest.approx([0.3])


def test_prompts_are_short_and_long_and_begin_alike():
    prompts = prompts_of(
        [f"How was film number {n}, and would you see it again?" for n in range(400)]
    )
    assert len(prompts) == len(set(prompts)) == 40
    lengths = sorted(map(len, prompts))
    assert lengths[0] < 60
    assert lengths[-1] > 1500
    assert prompts[-1][:1000] == prompts[-5][:1000]


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
