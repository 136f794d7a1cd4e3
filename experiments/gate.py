"""The gate on thumbs that mean nothing: how many whole runs publish anything."""

from experiments.arms import Arm, described, run_arms
from experiments.options import FOLDER, Folder, Jobs, Rounds, Seeds
from experiments.report import console, write

PREFERENCE = "praise"
ARMS = (Arm("shuffled thumbs", {"shuffled": True}),)


def main(seeds: Seeds = 20, rounds: Rounds = 6, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """Runs of six rounds on shuffled thumbs in which a version is published."""
    rows = run_arms(ARMS, [PREFERENCE], seeds, jobs, rounds=rounds)
    published = [sum(r["version"] is not None for r in row["rounds"]) for row in rows]
    runs = sum(count > 0 for count in published)
    console.print(f"{runs} of {seeds} runs published; versions by run: {published}")
    write(
        folder,
        "gate",
        {
            "arms": described(ARMS),
            "runs_that_published": runs,
            "published": published,
            "runs": rows,
        },
    )
