"""Two goals at once: a sweep over the weights of thumbs and of a length plots what can be had of both."""

from typing import Any

from matplotlib.axes import Axes

from experiments.arms import Arm, described, run_arms
from experiments.options import FOLDER, Folder, Jobs, Seeds, Thumbs
from experiments.report import console, draw, interval, write
from experiments.thumbs import examined_after

PREFERENCE = "courtesy"
WEIGHTS = (1.0, 0.8, 0.6, 0.4, 0.2)
"""Of the thumbs; the rest goes to short replies."""


def arm(weight: float) -> Arm:
    """Return the arm in which thumbs have this weight."""
    rewards: dict[str, Any] = {"thumbs": {"kind": "thumbs", "weight": weight}}
    if weight < 1:
        length = {"kind": "length", "target_tokens": 10, "scale_tokens": 8}
        rewards["length"] = length | {"weight": 1 - weight}
    any_length = {"max_length_drift": 100.0, "max_unwished_step": 100.0}
    return Arm(f"{weight:g}", trainer={"rewards": rewards, "gate": any_length})


ARMS = tuple(map(arm, WEIGHTS))


def main(seeds: Seeds = 2, thumbs: Thumbs = 200, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """Policy rate and length of replies by the weight of the thumbs."""
    rows = run_arms(ARMS, [PREFERENCE], seeds, jobs, thumbs=thumbs)
    points = []
    for each in ARMS:
        last = [examined_after(r, thumbs) for r in rows if r["arm"] == each.name]
        rate, tokens = (interval([e[key] for e in last]) for key in ("rate", "mean_tokens"))
        points.append({"weight": each.name, "rate": rate.mean, "tokens": tokens.mean})
        console.print(f"thumbs {each.name}: rate {rate.mean:.3f}, {tokens.mean:.1f} tokens")
    write(folder, "front", {"arms": described(ARMS), "points": points, "runs": rows})
    draw(folder, "front", lambda axes: plot(axes, points))


def plot(axes: Axes, points: list[dict[str, Any]]) -> None:
    """Draw the front."""
    axes.plot([p["tokens"] for p in points], [p["rate"] for p in points], "o-")
    for point in points:
        where = (point["tokens"], point["rate"])
        axes.annotate(point["weight"], where, textcoords="offset points", xytext=(6, -12))
    axes.set(xlabel="tokens of a reply", ylabel="share of replies liked", ylim=(0, 1.02))
