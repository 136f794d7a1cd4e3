"""A step's minibatch is of whole prompts, or of single rollouts: policy rate after equal thumbs."""

from experiments.arms import Arm, ablate
from experiments.options import FOLDER, Folder, Jobs, Seeds, Thumbs

PREFERENCES = ("praise", "courtesy")
ARMS = (
    Arm("rollouts", trainer={"ppo": {"minibatches": "rollouts"}}),
    Arm("prompts", trainer={"ppo": {"minibatches": "prompts"}}),
)


def main(seeds: Seeds = 5, thumbs: Thumbs = 200, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """A step takes whole prompts, or single rollouts."""
    ablate("minibatches", ARMS, PREFERENCES, seeds=seeds, thumbs=thumbs, jobs=jobs, folder=folder)
