"""Off-policy estimates of a version's thumb rate, made before anybody met it, against the rate it then has."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from demo.users import Crowd
from experiments.judged import with_slips
from experiments.report import Interval, interval

ESTIMATORS = ("snips", "dr")


def estimates(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was estimated of each version that a run published, and what is true of it."""
    noise = Crowd().noise
    found = []
    for ended, examined in zip(row["rounds"], row["examined"][1:], strict=True):
        for name in ESTIMATORS if ended["version"] is not None else ():
            if f"{name}_child" in ended["metrics"]:
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
                        "rate": with_slips(examined["rate"], noise),
                    }
                )
    return found


def plot_estimates(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Draw what was estimated, with its interval, over the rate that there was then."""
    for color, name in enumerate(ESTIMATORS):
        of_it = [p for p in points if p["estimator"] == name]
        axes.errorbar(
            [p["rate"] + 0.004 * color for p in of_it],  # side by side
            [p["value"] for p in of_it],
            [[p["value"] - p["low"] for p in of_it], [p["high"] - p["value"] for p in of_it]],
            fmt="o",
            markersize=3,
            elinewidth=0.7,
            alpha=0.7,
            color=f"C{color}",
            label=name,
        )
    axes.plot([0.3, 1], [0.3, 1], color="black", linestyle=":")
    axes.set(
        xlabel="thumb rate that the version then has", ylabel="estimated before", ylim=(0, 1.2)
    )
    axes.legend(loc="upper left")


def covered(points: Sequence[Mapping[str, Any]], estimator: str) -> dict[str, Any]:
    """Return of how many versions the rate is inside the 95 % interval, the bias, and the mean width."""
    of_it = [p for p in points if p["estimator"] == estimator]
    inside = sum(p["low"] <= p["rate"] <= p["high"] for p in of_it)
    bias = interval([p["value"] - p["rate"] for p in of_it]) if of_it else Interval(float("nan"))
    return {
        "versions": len(of_it),
        "inside": inside,
        "bias": bias,
        "width": sum(p["high"] - p["low"] for p in of_it) / max(len(of_it), 1),
    }
