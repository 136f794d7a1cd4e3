"""What experiments share: runs side by side, means with intervals, a JSON file and a picture."""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

mpl.use("agg")

CONFIDENCE = 0.95
console = Console(highlight=False, soft_wrap=True)

Task = TypeVar("Task")
Result = TypeVar("Result")


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent runs with Student's 95 % interval; one run has none."""
    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, stats.sem(values))
    return Interval(mean, float(low), float(high))


def paired(left: Sequence[float], right: Sequence[float]) -> Interval:
    """Return the mean of left - right over runs that share their seeds, with its interval."""
    return interval([a - b for a, b in zip(left, right, strict=True)])


def run_all(function: Callable[[Task], Result], tasks: Iterable[Task], jobs: int) -> list[Result]:
    """Call the function on every task, `jobs` processes at a time; say when each is done."""
    waiting = list(tasks)
    context = multiprocessing.get_context("spawn")
    results = []
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        for task, result in zip(waiting, pool.map(function, waiting), strict=True):
            console.print(f"  {task}", markup=False)
            results.append(result)
    return results


def write(folder: Path, name: str, report: dict[str, Any]) -> None:
    """Write NAME.json into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
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
