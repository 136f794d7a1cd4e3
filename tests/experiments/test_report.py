import json
import math
from dataclasses import astuple
from operator import neg
from pathlib import Path
from typing import Any

import pytest

from experiments import side_by_side
from experiments.arms import Arm, summarise
from experiments.judged import JudgedRewards, quality
from experiments.off_policy import covered, estimates
from experiments.report import Interval, draw, interval, paired, write
from experiments.side_by_side import run_all
from experiments.thumbs import examined_after, thumbs_to_goal


def test_the_interval_is_students():
    found = interval([1.0, 2.0, 3.0])  # mean 2, standard error 0.577, t of 2 degrees 4.303
    assert astuple(found) == pytest.approx((2.0, 2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert str(found) == "2.000 (-0.484 to 4.484)"


def test_one_run_has_no_interval():
    assert interval([0.5]) == Interval(0.5)
    assert str(interval([0.5])) == "0.500 (one run)"


def test_pairs_share_their_seeds():
    assert paired([1.0, 5.0], [0.5, 4.5]) == Interval(0.5, 0.5, 0.5)


def test_runs_come_back_in_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(side_by_side, "base_model", Path)
    assert run_all(neg, range(5), jobs=2) == [0, -1, -2, -3, -4]


def test_results_are_written(tmp_path: Path):
    write(tmp_path / "new", "claim", {"rate": Interval(0.5)})
    written = json.loads((tmp_path / "new" / "claim.json").read_text())
    assert written == {"rate": {"mean": 0.5, "low": None, "high": None}}
    write(tmp_path, "never", {"thumbs": math.inf})
    assert json.loads((tmp_path / "never.json").read_text()) == {"thumbs": None}
    draw(tmp_path / "new", "claim", lambda axes: axes.plot([1, 2]))
    assert (tmp_path / "new" / "claim.png").stat().st_size > 1000


def test_quality_ranks_within_a_version_and_counts_slips():
    judged = [
        JudgedRewards([1.0, -1.0], [0.9, 0.1], [1.0, 0.0]),
        JudgedRewards([-5.0, -4.0], [0.9, 0.1], [1.0, 0.0]),  # wrong, whatever the other's scores
    ]
    found = quality(judged, noise=0.1)
    assert (found.auroc, found.candidates) == (0.5, 4)
    assert found.calibration_error == pytest.approx(0)  # 0.9 of those who like it say so


def examined(*points: tuple[int, float]) -> dict[str, Any]:
    """A run of which these thumbs and rates are known, a version each."""
    return {
        "examined": [{"thumbs": thumbs, "rate": rate} for thumbs, rate in points],
        "rounds": [{"version": i + 1, "metrics": {}} for i in range(len(points) - 1)],
    }


def test_the_goal_is_reached_by_the_first_version_that_is_there():
    row = examined((0, 0.3), (70, 0.84), (140, 0.86), (210, 0.8))
    assert thumbs_to_goal(row) == 140
    assert thumbs_to_goal(examined((0, 0.3))) == math.inf


def test_equal_thumbs_are_compared_by_the_version_that_was_there_then():
    early, late = examined((0, 0.3), (70, 0.5), (150, 0.9)), examined((0, 0.3), (99, 0.6))
    assert [examined_after(early, n)["rate"] for n in (69, 70, 149, 150, 999)] == [
        0.3,
        0.5,
        0.5,
        0.9,
        0.9,
    ]
    rows = [{"arm": "one", **early}, {"arm": "two", **late}]
    found = summarise(rows, [Arm("one"), Arm("two")], 100)
    assert found["two"]["against"]["one"].mean == pytest.approx(0.1)


def test_estimates_are_held_against_the_rate_with_slips_of_what_was_published():
    row = {"preference": "praise", "seed": 0, **examined((0, 0.3), (70, 0.5), (140, 0.5))}
    row["rounds"][0]["metrics"] = {"dr_child": 0.7, "dr_child_low": 0.45, "dr_child_high": 0.9}
    row["rounds"][1] = {"version": None, "metrics": row["rounds"][0]["metrics"]}
    points = estimates(row)
    assert [(p["version"], p["rate"]) for p in points] == [(1, pytest.approx(0.5))]
    found = covered(points, "dr")
    assert (found["versions"], found["inside"], found["width"]) == (1, 1, pytest.approx(0.45))
    assert found["bias"].mean == pytest.approx(0.2)
    assert covered(points, "snips")["versions"] == 0
