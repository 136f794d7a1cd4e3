"""All candidates train the policy, or the chosen ones alone: policy rate after equal thumbs."""

from experiments.arms import Arm, ablate
from experiments.options import FOLDER, Folder, Jobs, Seeds, Thumbs

PREFERENCES = ("praise", "courtesy")
ARMS = (
    Arm("all candidates"),
    Arm("chosen only", trainer={"round": {"candidates": "chosen"}}),
)


def main(seeds: Seeds = 5, thumbs: Thumbs = 200, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """All candidates train the policy, or the chosen ones alone."""
    ablate("candidates", ARMS, PREFERENCES, seeds=seeds, thumbs=thumbs, jobs=jobs, folder=folder)
