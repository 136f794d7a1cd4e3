import json
from pathlib import Path

import pytest

from experiments import side_by_side
from experiments.judged import quality
from experiments.report import draw, interval, paired, write
from experiments.run import JudgedRewards
from experiments.side_by_side import run_all


def double(x: int) -> int:
    return 2 * x


def test_the_interval_is_students():
    found = interval([1.0, 2.0, 3.0])  # mean 2, standard error 0.577, t of 2 degrees 4.303
    assert found == pytest.approx((2.0, 2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert interval([0.5]) == (0.5, 0.5, 0.5)


def test_pairs_share_their_seeds():
    assert paired([1.0, 5.0], [0.5, 4.5]) == (0.5, 0.5, 0.5)


def test_runs_come_back_in_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(side_by_side, "base_model", Path)
    assert run_all(double, range(5), jobs=2) == [0, 2, 4, 6, 8]


def test_results_are_written(tmp_path: Path):
    write(tmp_path / "new", "claim", {"rate": 0.5})
    assert json.loads((tmp_path / "new" / "claim.json").read_text()) == {"rate": 0.5}
    draw(tmp_path / "new", "claim", lambda axes: axes.plot([1, 2]))
    assert (tmp_path / "new" / "claim.png").stat().st_size > 1000


def test_quality_ranks_within_a_version_and_counts_slips():
    judged = [
        JudgedRewards(1, [1.0, -1.0], [0.9, 0.1], [1.0, 0.0]),
        JudgedRewards(
            2, [-5.0, -4.0], [0.9, 0.1], [1.0, 0.0]
        ),  # wrong, whatever the other's scores
    ]
    found = quality(judged, noise=0.1)
    assert (found.auroc, found.candidates) == (0.5, 4)
    assert found.calibration_error == pytest.approx(0)  # 0.9 of those who like it say so
