"""Off-policy estimates of a version's thumb rate, made before anybody met it, against the rate it then has."""

from typing import Any

from demo.preferences import SHIPPED
from demo.users import Crowd
from experiments.arms import Arm, described, run_arms
from experiments.options import FOLDER, Folder, Jobs, Rounds, Seeds
from experiments.report import console, interval, write

ARMS = (Arm("as it is"),)
ESTIMATORS = ("snips", "dr")


def main(seeds: Seeds = 5, rounds: Rounds = 6, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """Share of versions whose thumb rate is inside the 95 % interval that was estimated for it."""
    rows = run_arms(ARMS, list(SHIPPED), seeds, jobs, rounds=rounds)
    points = [point for row in rows for point in estimates(row)]
    summary = {}
    for name in ESTIMATORS:
        of_it = [p for p in points if p["estimator"] == name]
        inside = sum(p["low"] <= p["rate"] <= p["high"] for p in of_it)
        bias = interval([p["value"] - p["rate"] for p in of_it])
        width = sum(p["high"] - p["low"] for p in of_it) / max(len(of_it), 1)
        summary[name] = {
            "versions": len(of_it),
            "coverage": inside / max(len(of_it), 1),
            "bias": bias._asdict(),
            "width": width,
        }
        console.print(
            f"{name}: {inside} of {len(of_it)} versions inside; bias {bias}, width {width:.3f}"
        )
    write(
        folder,
        "off_policy",
        {"arms": described(ARMS), "summary": summary, "points": points, "runs": rows},
    )


def estimates(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was estimated of each published version, and what is true of it."""
    noise = Crowd().noise
    found = []
    for ended, examined in zip(row["rounds"], row["examined"][1:], strict=True):
        for name in ESTIMATORS if ended["version"] is not None else ():
            if f"{name}_child" in ended["metrics"]:
                rate = examined["rate"] * (1 - noise) + (1 - examined["rate"]) * noise
                value, low, high = (
                    ended["metrics"][f"{name}_child{end}"] for end in ("", "_low", "_high")
                )
                found.append(
                    {
                        "estimator": name,
                        "preference": row["preference"],
                        "seed": row["seed"],
                        "version": ended["version"],
                        "value": value,
                        "low": low,
                        "high": high,
                        "rate": rate,
                    }
                )
    return found
