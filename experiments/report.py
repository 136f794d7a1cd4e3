"""What experiments share: means with intervals, a JSON file and a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic_core import to_json
from rich.console import Console
from scipy import stats

mpl.use("agg")

CONFIDENCE = 0.95
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.3f} (one run)"
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent runs with Student's 95 % interval; one run has none."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, stats.sem(values))
    return Interval(mean, float(low), float(high))


def paired(left: Sequence[float], right: Sequence[float]) -> Interval:
    """Return the mean of left - right over runs that share their seeds, with its interval."""
    return interval([a - b for a, b in zip(left, right, strict=True)])


def write(folder: Path, name: str, report: dict[str, Any]) -> None:
    """Write NAME.json into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_bytes(to_json(report, indent=1, inf_nan_mode="null") + b"\n")
    console.print(f"Details: {path}")


def draw(
    folder: Path, name: str, fill: Callable[[Axes], None], *, size: tuple[float, float] = (7.5, 4.2)
) -> None:
    """Write NAME.png into the folder; `fill` draws."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    fill(axes)
    axes.grid(alpha=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=110)
