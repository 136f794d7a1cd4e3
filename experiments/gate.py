"""The gate on thumbs that mean nothing: how many whole runs publish anything."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from experiments.arms import Arm, described, run_arms
from experiments.options import FOLDER, Folder, Jobs, Rounds, Seeds
from experiments.report import console, draw, write
from experiments.thumbs import published

PREFERENCE = "praise"
ARMS = (Arm("shuffled thumbs", {"shuffled": True}),)


def main(seeds: Seeds = 20, rounds: Rounds = 6, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """Runs of six rounds on shuffled thumbs in which a version is published."""
    rows = run_arms(ARMS, [PREFERENCE], seeds, jobs, rounds=rounds)
    versions = [published(row) for row in rows]
    runs = sum(count > 0 for count in versions)
    console.print(f"{runs} of {seeds} runs published; versions by run: {versions}")
    write(
        folder,
        "gate",
        {
            "arms": described(ARMS),
            "runs_that_published": runs,
            "published": versions,
            "runs": rows,
        },
    )
    draw(folder, "gate", lambda axes: _plot(axes, rows))


def _plot(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw how near each run came: the bound that has to pass one half, look by look."""
    for row in rows:
        bounds = [r["metrics"].get("reward_auroc_bound", math.nan) for r in row["rounds"]]
        axes.plot(range(1, len(bounds) + 1), bounds, "o-", color="C0", alpha=0.4, markersize=3)
    axes.axhline(0.5, color="black", linestyle=":")
    axes.set(xlabel="round", ylabel="lower bound of the AUROC on held-out thumbs")
