"""The supervised warm start before PPO, alone, and not at all: policy rate after equal thumbs."""

from experiments.arms import Arm, ablate
from experiments.options import FOLDER, Folder, Jobs, Seeds, Thumbs

PREFERENCES = ("praise", "brevity", "courtesy")
_WARM = {"supervised": {"enabled": True}}
ARMS = (
    Arm("PPO"),
    Arm("supervised, then PPO", trainer=_WARM),
    Arm("supervised alone", trainer=_WARM | {"ppo": {"learning_rate": 1e-12}}),
)


def main(seeds: Seeds = 5, thumbs: Thumbs = 200, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """The supervised warm start before PPO, alone, and not at all."""
    ablate("stages", ARMS, PREFERENCES, seeds=seeds, thumbs=thumbs, jobs=jobs, folder=folder)
