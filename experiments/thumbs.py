"""How many thumbs it takes until the policy alone pleases in 85 % of its replies."""

import math
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from demo.preferences import SHIPPED
from experiments.options import FOLDER, Folder, Jobs, Rounds, Seeds
from experiments.report import console, draw, write
from experiments.run import learn
from experiments.serving import Setting
from experiments.side_by_side import run_all

GOAL = 0.85


class Task(NamedTuple):
    """One run."""

    preference: str
    seed: int
    rounds: int


def main(seeds: Seeds = 5, rounds: Rounds = 6, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """Thumbs to a policy rate of 0.85, for each preference."""
    tasks = [Task(name, seed, rounds) for name in SHIPPED for seed in range(seeds)]
    runs = run_all(run, tasks, jobs)
    rows = [{**task._asdict(), **found} for task, found in zip(tasks, runs, strict=True)]
    needed = {
        name: [thumbs_to_goal(row) for row in rows if row["preference"] == name] for name in SHIPPED
    }
    for name, counts in needed.items():
        console.print(f"{name}: median {median(counts):g} thumbs; {counts}")
    total = median(count for counts in needed.values() for count in counts)
    console.print(f"all: median {total:g}")
    write(folder, "thumbs", {"goal": GOAL, "median": str(total), "runs": rows})
    draw(folder, "thumbs", lambda axes: plot(axes, rows))


def run(task: Task) -> dict[str, Any]:
    """Learn for some rounds."""
    return learn(Setting(task.preference, task.seed), rounds=task.rounds)


def thumbs_to_goal(row: Mapping[str, Any]) -> float:
    """Return how many thumbs had been given when a version that reached the goal was published."""
    return next((e["thumbs"] for e in row["examined"] if e["rate"] >= GOAL), math.inf)


def plot(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw every run's rate over the thumbs it had."""
    for color, name in enumerate(SHIPPED):
        for row in (r for r in rows if r["preference"] == name):
            axes.plot(
                [e["thumbs"] for e in row["examined"]],
                [e["rate"] for e in row["examined"]],
                "o-",
                color=f"C{color}",
                alpha=0.6,
                label=name if row["seed"] == 0 else None,
            )
    axes.axhline(GOAL, color="black", linestyle=":")
    axes.set(xlabel="thumbs given", ylabel="share of replies liked", ylim=(0, 1.02))
    axes.legend(loc="lower right")
