"""The supervised warm start before PPO, alone, and not at all: policy rate after equal thumbs."""

from experiments.arms import Arm, described, plot_rates, run_arms, summarise
from experiments.options import FOLDER, Folder, Jobs, Seeds, Thumbs
from experiments.report import draw, write

PREFERENCES = ("praise", "brevity", "courtesy")
_WARM = {"supervised": {"enabled": True}}
ARMS = (
    Arm("PPO"),
    Arm("supervised, then PPO", trainer=_WARM),
    Arm("supervised alone", trainer=_WARM | {"ppo": {"learning_rate": 1e-12}}),
)


def main(seeds: Seeds = 5, thumbs: Thumbs = 320, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """The supervised warm start before PPO, alone, and not at all."""
    rows = run_arms(ARMS, PREFERENCES, seeds, jobs, thumbs=thumbs)
    write(
        folder, "stages", {"arms": described(ARMS), "summary": summarise(rows, ARMS), "runs": rows}
    )
    draw(folder, "stages", lambda axes: plot_rates(axes, rows, ARMS))
