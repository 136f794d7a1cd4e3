"""Negative controls: what means nothing must not change the policy's rate, even with the gate off."""

from typing import Any

from experiments.arms import NO_GATE, Arm, described, run_arms
from experiments.options import FOLDER, Folder, Jobs, Rounds, Seeds
from experiments.report import console, draw, interval, write
from experiments.thumbs import plot_rates

PREFERENCE = "praise"
ARMS = (
    Arm("shuffled thumbs", {"shuffled": True}, NO_GATE),
    Arm(
        "constant reward",
        trainer={**NO_GATE, "rewards": {"any": {"kind": "format", "weight": 1, "pattern": ".*"}}},
    ),
)


def main(seeds: Seeds = 10, rounds: Rounds = 4, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """Mean change of the policy's rate under shuffled thumbs and a constant reward."""
    rows = run_arms(ARMS, [PREFERENCE], seeds, jobs, rounds=rounds)
    changes = {
        arm.name: interval([_change(r) for r in rows if r["arm"] == arm.name]) for arm in ARMS
    }
    for name, change in changes.items():
        console.print(f"{name}: change {change}")
    write(folder, "controls", {"arms": described(ARMS), "change": changes, "runs": rows})
    draw(folder, "controls", lambda axes: plot_rates(axes, rows, "arm", list(changes)))


def _change(row: dict[str, Any]) -> float:
    return float(row["examined"][-1]["rate"] - row["examined"][0]["rate"])
