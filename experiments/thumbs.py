"""How many thumbs it takes until the policy alone pleases in most of its replies."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

GOAL = 0.85


def thumbs_to_goal(row: Mapping[str, Any]) -> float:
    """Return how many thumbs had been given when the first version that reached the goal was published."""
    return next((e["thumbs"] for e in row["examined"] if e["rate"] >= GOAL), math.inf)


def examined_after(row: Mapping[str, Any], thumbs: int) -> Mapping[str, Any]:
    """Return the version that was there when so many thumbs had been given, as it was examined."""
    found: Mapping[str, Any] = [e for e in row["examined"] if e["thumbs"] <= thumbs][-1]
    return found


def published(row: Mapping[str, Any]) -> int:
    """Return how many versions a run published."""
    return sum(ended["version"] is not None for ended in row["rounds"])


def plot_rates(
    axes: Axes, rows: Sequence[Mapping[str, Any]], by: str, names: Sequence[str]
) -> None:
    """Draw the policy's rate over thumbs, every run thin, in the colour of its arm or preference."""
    for color, name in enumerate(names):
        for i, row in enumerate(r for r in rows if r[by] == name):
            axes.plot(
                [e["thumbs"] for e in row["examined"]],
                [e["rate"] for e in row["examined"]],
                "o-",
                color=f"C{color}",
                alpha=0.5,
                markersize=3,
                label=name if i == 0 else None,
            )
    axes.set(xlabel="thumbs given", ylabel="share of replies liked", ylim=(0, 1.02))
    axes.legend()  # where it hides least
