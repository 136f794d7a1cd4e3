"""Do corrections of the reward fit matter? Only chosen replies are rated; fits are judged on random ones.

One version shows, nearly always, what its reward model likes best. All fits learn from the same thumbs on what
it showed, from nothing, and are judged on the same candidates of the same policy.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes

from experiments.arms import NO_GATE
from experiments.judged import JudgedRewards, quality
from experiments.options import FOLDER, Folder, Jobs, Seeds, Thumbs
from experiments.report import console, draw, interval, paired, write
from experiments.run import Run
from experiments.serving import Setting
from experiments.side_by_side import run_all
from trainer import reward
from trainer.calibration import Calibration

PREFERENCES = {"well specified": "praise", "misspecified": "experiments.hard:exclusive"}
SHARP = 0.1
"""Temperature of the choice: nearly the best one, so that what is rated is far from random."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "weighted": {},
    "not weighted": {"propensity_weights": False},
    "weighted, class balance": {"class_balance": True},
}
MEASURES = ("auroc", "calibration_error")


class Task(NamedTuple):
    """One logging run."""

    model: str
    seed: int
    thumbs: int


def main(seeds: Seeds = 5, thumbs: Thumbs = 320, jobs: Jobs = 2, folder: Folder = FOLDER) -> None:
    """AUROC and calibration error on random candidates, by how the reward model is fitted."""
    tasks = [Task(model, seed, thumbs) for model in PREFERENCES for seed in range(seeds)]
    rows = [row for rows in run_all(run, tasks, jobs) for row in rows]
    summary: dict[str, Any] = {}
    for model in PREFERENCES:
        for measure in MEASURES:
            found = {
                name: [r[measure] for r in rows if (r["model"], r["variant"]) == (model, name)]
                for name in VARIANTS
            }
            first, *others = VARIANTS
            words = f"{model}: {measure} {interval(found[first])} {first}"
            for other in others:
                difference = paired(found[other], found[first])
                summary[f"{model}, {measure}, {other} - {first}"] = difference
                words += f"; {interval(found[other])} {other}, difference {difference}"
            console.print(words)
    write(folder, "propensity", {"summary": summary, "runs": rows})
    draw(folder, "propensity", lambda axes: _plot(axes, rows))


def _plot(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw every fit by how it ranks and how far off its claims are."""
    for color, variant in enumerate(VARIANTS):
        for marker, model in zip("ox", PREFERENCES, strict=True):
            of_it = [r for r in rows if (r["variant"], r["model"]) == (variant, model)]
            axes.plot(
                [r["auroc"] for r in of_it],
                [r["calibration_error"] for r in of_it],
                marker,
                color=f"C{color}",
                label=f"{variant}, {model}",
            )
    axes.set(xlabel="AUROC on random candidates", ylabel="calibration error")
    axes.legend(fontsize="small")


def run(task: Task) -> list[dict[str, Any]]:
    """Log thumbs on what one version shows; fit on them in every way, and judge."""
    setting = Setting(PREFERENCES[task.model], task.seed, temperature=SHARP)
    with Run(setting, trainer=NO_GATE) as logging:
        if logging.round().version is None:
            raise RuntimeError(
                "the first round published nothing: there is no ranking to correct for"
            )
        thumbs = logging.log(task.thumbs)
        candidates = logging.candidates()
        trunk, settings = logging.assembly.trunk, logging.config.reward
        rows = []
        for name, changes in VARIANTS.items():
            torch.manual_seed(task.seed)
            trunk.reset()
            generator = torch.Generator().manual_seed(task.seed)
            fitted = reward.fit(trunk, thumbs, settings.model_copy(update=changes), generator)
            rewards = reward.score(trunk, candidates.replies).tolist()
            claims = Calibration(offset=fitted.offset).probabilities(rewards).tolist()
            found = quality([JudgedRewards(rewards, claims, candidates.likes)], setting.crowd.noise)
            rows.append({**task._asdict(), "variant": name, **found._asdict()})
        return rows
