"""The loop as it is: how fast it learns, how good its reward models are, whether its estimates hold."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes

from demo.preferences import SHIPPED
from experiments.arms import Arm, described, run_arms
from experiments.off_policy import ESTIMATORS, covered, estimates, plot_estimates
from experiments.options import FOLDER, Folder, Jobs, Rounds, Seeds
from experiments.report import console, draw, interval, write
from experiments.thumbs import GOAL, plot_rates, thumbs_to_goal

ARMS = (Arm("as it is"),)


def main(seeds: Seeds = 5, rounds: Rounds = 6, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """Thumbs to a policy rate of 0.85, quality of reward models, coverage of off-policy estimates."""
    rows = run_arms(ARMS, list(SHIPPED), seeds, jobs, rounds=rounds)
    points = [point for row in rows for point in estimates(row)]
    report = {"arms": described(ARMS), "thumbs": _thumbs(rows), "reward": _reward(rows)}
    off_policy = {name: covered(points, name) for name in ESTIMATORS}
    for name, found in off_policy.items():
        console.print(
            f"{name}: {found['inside']} of {found['versions']} versions inside; bias {found['bias']},"
            f" width {found['width']:.3f}"
        )
    write(
        folder, "learning", {**report, "off_policy": off_policy, "estimates": points, "runs": rows}
    )
    draw(folder, "learning", lambda axes: _plot(axes, rows))
    draw(folder, "off_policy", lambda axes: plot_estimates(axes, points))


def _thumbs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Print and return how many thumbs it took to the goal."""
    needed = {
        name: [thumbs_to_goal(row) for row in rows if row["preference"] == name] for name in SHIPPED
    }
    for name, counts in needed.items():
        console.print(f"{name}: median {median(counts):g} thumbs to {GOAL}; {counts}")
    total = median(count for counts in needed.values() for count in counts)
    console.print(f"all: median {total:g}")
    return {"goal": GOAL, "median": total, "needed": needed}


def _reward(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Print and return how good the reward models of a run's versions are together."""
    found = {}
    for name in (*SHIPPED, "all"):
        judged = [r["reward"] for r in rows if name in ("all", r["preference"])]
        of_them = [q for q in judged if q["candidates"]]  # a run that published none has none
        if not of_them:
            continue
        auroc, error = (
            interval([q[key] for q in of_them]) for key in ("auroc", "calibration_error")
        )
        candidates = sum(q["candidates"] for q in of_them)
        found[name] = {"auroc": auroc, "calibration_error": error, "candidates": candidates}
        console.print(
            f"{name}: AUROC {auroc}, calibration error {error}, on {candidates} candidates"
        )
    return found


def _plot(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    plot_rates(axes, rows, "preference", list(SHIPPED))
    axes.axhline(GOAL, color="black", linestyle=":")
