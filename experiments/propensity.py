"""Do propensity weights matter? Only chosen replies are rated; reward models are judged on random ones."""

from typing import NamedTuple

from experiments.judged import Quality, as_row, judge, quality
from experiments.options import FOLDER, Folder, Jobs, Rounds, Seeds
from experiments.report import console, interval, paired, write
from experiments.serving import Setting
from experiments.side_by_side import run_all

CANDIDATES = 500
PREFERENCES = {"well specified": "praise", "misspecified": "experiments.hard:exclusive"}
SHARP = 0.1
"""Temperature of the choice: nearly the best one, so that what is rated is far from random."""


class Task(NamedTuple):
    """One run."""

    model: str
    is_weighted: bool
    seed: int
    rounds: int


def main(seeds: Seeds = 5, rounds: Rounds = 4, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """AUROC and calibration error on random candidates, with propensity weights and without."""
    tasks = [
        Task(model, is_weighted, seed, rounds)
        for model in PREFERENCES
        for seed in range(seeds)
        for is_weighted in (True, False)
    ]
    found = run_all(run, tasks, jobs)
    rows = [as_row(task, each) for task, each in zip(tasks, found, strict=True)]
    for model in PREFERENCES:
        for measure in ("auroc", "calibration_error"):
            weighted, plain = (
                [r[measure] for r in rows if r["model"] == model and r["is_weighted"] is on]
                for on in (True, False)
            )
            console.print(
                f"{model}: {measure} {interval(weighted)} with weights, {interval(plain)} without;"
                f" difference {paired(weighted, plain)}"
            )
    write(folder, "propensity", {"runs": rows})


def run(task: Task) -> Quality:
    """Learn, and judge."""
    setting = Setting(PREFERENCES[task.model], task.seed, temperature=SHARP)
    judged = judge(
        setting,
        rounds=task.rounds,
        candidates=CANDIDATES,
        trainer={
            "reward": {"propensity_weights": task.is_weighted},
            "gate": {"enabled": False},
        },
    )
    return quality(judged, setting.crowd.noise)
