"""All candidates train the policy, or the chosen ones alone: policy rate after equal thumbs."""

from experiments.arms import Arm, described, plot_rates, run_arms, summarise
from experiments.options import FOLDER, Folder, Jobs, Seeds, Thumbs
from experiments.report import draw, write

PREFERENCES = ("praise", "courtesy")
ARMS = (
    Arm("all candidates"),
    Arm("chosen only", trainer={"round": {"candidates": "chosen"}}),
)


def main(seeds: Seeds = 5, thumbs: Thumbs = 320, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """All candidates train the policy, or the chosen ones alone."""
    rows = run_arms(ARMS, PREFERENCES, seeds, jobs, thumbs=thumbs)
    write(
        folder,
        "candidates",
        {"arms": described(ARMS), "summary": summarise(rows, ARMS), "runs": rows},
    )
    draw(folder, "candidates", lambda axes: plot_rates(axes, rows, ARMS))
