"""Arms side by side: the same seeds and thumbs, one thing different."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.report import console, draw, interval, paired, write
from experiments.run import learn
from experiments.serving import Setting
from experiments.side_by_side import run_all
from experiments.thumbs import examined_after, plot_rates

NO_GATE: Mapping[str, Any] = {"gate": {"enabled": False}}
"""Trainer settings under which everything finite is published."""


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


def rates(rows: Sequence[Mapping[str, Any]], arm: str, thumbs: int) -> list[float]:
    """Return an arm's policy rates after so many thumbs, in the order of preference and seed."""
    return [float(examined_after(row, thumbs)["rate"]) for row in rows if row["arm"] == arm]


def summarise(
    rows: Sequence[Mapping[str, Any]], arms: Sequence[Arm], thumbs: int
) -> dict[str, Any]:
    """Print and return policy rates of the arms after equal thumbs, and how each differs from those before it."""
    found = {arm.name: rates(rows, arm.name, thumbs) for arm in arms}
    summary: dict[str, Any] = {}
    for i, (name, its) in enumerate(found.items()):
        against = {other: paired(its, found[other]) for other in list(found)[:i]}
        summary[name] = {"rate": interval(its), "against": against}
        words = [f"{name}: policy rate {interval(its)}"]
        words += [f"against {other} {difference}" for other, difference in against.items()]
        console.print("; ".join(words))
    return summary


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
    """Run the arms on as many thumbs each; write their rates then, and draw how they got there."""
    rows = run_arms(arms, preferences, seeds, jobs, thumbs=thumbs)
    summary = summarise(rows, arms, thumbs)
    write(folder, name, {"arms": described(arms), "summary": summary, "runs": rows})
    draw(folder, name, lambda axes: plot_rates(axes, rows, "arm", [arm.name for arm in arms]))


def described(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the arms as they are written down."""
    return [asdict(arm) for arm in arms]
