"""The reward model on random candidates, judged by the noiseless preference, pooled over versions."""

from typing import Any, NamedTuple

from demo.preferences import SHIPPED
from experiments.judged import Quality, as_row, judge, quality
from experiments.options import FOLDER, Folder, Jobs, Rounds, Seeds
from experiments.report import console, interval, write
from experiments.serving import Setting
from experiments.side_by_side import run_all

CANDIDATES = 500
"""For each version."""
VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "class balance": {"class_balance": True}}


class Task(NamedTuple):
    """One run."""

    variant: str
    preference: str
    seed: int
    rounds: int


def main(seeds: Seeds = 3, rounds: Rounds = 5, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """AUROC and calibration error of the reward model, with and without an offset for class balance."""
    tasks = [
        Task(variant, preference, seed, rounds)
        for preference in SHIPPED
        for seed in range(seeds)
        for variant in VARIANTS
    ]
    found = run_all(run, tasks, jobs)
    rows = [as_row(task, each) for task, each in zip(tasks, found, strict=True)]
    for variant in VARIANTS:
        for preference in (*SHIPPED, None):
            of_them = [
                r for r in rows if r["variant"] == variant and preference in (None, r["preference"])
            ]
            console.print(
                f"{variant}, {preference or 'all'}:"
                f" AUROC {interval([r['auroc'] for r in of_them])},"
                f" calibration error {interval([r['calibration_error'] for r in of_them])},"
                f" {sum(r['candidates'] for r in of_them)} candidates"
            )
    write(folder, "reward", {"runs": rows})


def run(task: Task) -> Quality:
    """Learn, and judge."""
    setting = Setting(task.preference, task.seed)
    judged = judge(
        setting,
        rounds=task.rounds,
        candidates=CANDIDATES,
        trainer={"reward": VARIANTS[task.variant]},
    )
    return quality(judged, setting.crowd.noise)
