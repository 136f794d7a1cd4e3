"""Arms side by side: the same seeds and thumbs, one thing different."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from experiments.report import console, draw, interval, paired, write
from experiments.run import learn
from experiments.serving import Setting
from experiments.side_by_side import run_all


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of doing it."""

    name: str
    setting: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)


class Task(NamedTuple):
    """One run of one arm."""

    arm: Arm
    preference: str
    seed: int
    thumbs: int | None
    rounds: int | None

    def __str__(self) -> str:
        return f"{self.arm.name}, {self.preference}, seed {self.seed}"


def run(task: Task) -> dict[str, Any]:
    """Learn as the arm does."""
    setting = replace(Setting(task.preference, task.seed), **task.arm.setting)
    learned = learn(setting, thumbs=task.thumbs, rounds=task.rounds, trainer=task.arm.trainer)
    return {"arm": task.arm.name, "preference": task.preference, "seed": task.seed, **learned}


def run_arms(
    arms: Sequence[Arm],
    preferences: Sequence[str],
    seeds: int,
    jobs: int,
    *,
    thumbs: int | None = None,
    rounds: int | None = None,
) -> list[dict[str, Any]]:
    """Run every arm on every preference and seed; return one row for each."""
    tasks = [
        Task(arm, preference, seed, thumbs, rounds)
        for preference in preferences
        for seed in range(seeds)
        for arm in arms
    ]
    return run_all(run, tasks, jobs)


def final_rates(rows: Sequence[Mapping[str, Any]], arm: str) -> list[float]:
    """Return the policy rates that an arm ended with, in the order of preference and seed."""
    return [row["examined"][-1]["rate"] for row in rows if row["arm"] == arm]


def summarise(rows: Sequence[Mapping[str, Any]], arms: Sequence[Arm]) -> dict[str, Any]:
    """Print and return final rates of the arms, and how they differ from the first."""
    first = final_rates(rows, arms[0].name)
    summary: dict[str, Any] = {}
    for arm in arms:
        rates = final_rates(rows, arm.name)
        summary[arm.name] = {"rate": interval(rates)._asdict()}
        words = f"{arm.name}: policy rate {interval(rates)}"
        if arm is not arms[0]:
            difference = paired(rates, first)
            summary[arm.name]["difference"] = difference._asdict()
            words += f"; against {arms[0].name} {difference}"
        console.print(words)
    return summary


def plot_rates(axes: Axes, rows: Sequence[Mapping[str, Any]], arms: Sequence[Arm]) -> None:
    """Draw the policy's rate over thumbs, every run thin, in the colour of its arm."""
    for color, arm in enumerate(arms):
        for i, row in enumerate(r for r in rows if r["arm"] == arm.name):
            axes.plot(
                [e["thumbs"] for e in row["examined"]],
                [e["rate"] for e in row["examined"]],
                "o-",
                color=f"C{color}",
                alpha=0.5,
                markersize=3,
                label=arm.name if i == 0 else None,
            )
    axes.set(xlabel="thumbs given", ylabel="share of replies liked", ylim=(0, 1.02))
    axes.legend(loc="lower right")


def ablate(
    name: str,
    arms: Sequence[Arm],
    preferences: Sequence[str],
    *,
    seeds: int,
    thumbs: int,
    jobs: int,
    folder: Path,
) -> None:
    """Run the arms on as many thumbs each; write how they end, and draw how they get there."""
    rows = run_arms(arms, preferences, seeds, jobs, thumbs=thumbs)
    report = {"arms": described(arms), "summary": summarise(rows, arms), "runs": rows}
    write(folder, name, report)
    draw(folder, name, lambda axes: plot_rates(axes, rows, arms))


def described(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the arms as they are written down."""
    return [asdict(arm) for arm in arms]
