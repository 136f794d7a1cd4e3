"""What becomes of groups that lost candidates to pruning: policy rate after equal thumbs."""

from experiments.arms import Arm, ablate
from experiments.options import FOLDER, Folder, Jobs, Seeds, Thumbs
from server.guidance.outcome import Checkpoint
from thumbloop.types import Strategy

PREFERENCES = ("praise", "courtesy")
PRUNING = {
    "strategy": Strategy.SPECULATIVE_REJECTION,
    "num_candidates": 8,
    "checkpoints": (Checkpoint(tokens=8, keep=3),),
    "audit_share": 0.1,
}
ARMS = (
    Arm("excluded", PRUNING, {"round": {"pruned": "exclude"}}),
    Arm("bootstrapped", PRUNING, {"round": {"pruned": "bootstrap"}}),
    Arm("survivors only", PRUNING, {"round": {"pruned": "survivors"}}),
)


def main(seeds: Seeds = 5, thumbs: Thumbs = 200, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """What becomes of groups that lost candidates to pruning."""
    ablate("truncation", ARMS, PREFERENCES, seeds=seeds, thumbs=thumbs, jobs=jobs, folder=folder)
