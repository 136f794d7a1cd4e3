"""python -m loadtest.learning: our learning beside what others offer, and beside its own past.

Everything is installed, started and stopped here. Ratios are what to read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from loadtest.benchmark import Benchmark
from loadtest.beside import RESTED_SHARE, beside
from loadtest.environments import NotInstalled
from loadtest.episodes import sample
from loadtest.figures import Figure, Goal
from loadtest.first import NoHistory
from loadtest.gpu import gpu
from loadtest.killing import kill
from loadtest.midway import Midway
from loadtest.rounds import round_
from loadtest.setting import CallsFailed
from loadtest.steps import step
from loadtest.swapping import NotTaken
from loadtest.tokens import rollout
from loadtest.work import Work

PARTS: dict[str, Callable[[Work], dict[str, Figure]]] = {
    "step": step,
    "sample": sample,
    "round": round_,
    "rollout": rollout,
    "beside": beside,
    "kill": kill,
    "gpu": gpu,
}
LEARNING = Benchmark(
    name="learning",
    command="make bench-learning",
    parts=list(PARTS),
    dtypes=["float32"],
    goals={
        "step.ratio_to_trl_0_11": Goal(0.6, is_upper=True),
        "step.ratio_to_trl_1_12": Goal(0.6, is_upper=True),
        "step.memory_ratio": Goal(0.7, is_upper=True),
        "sample.ratio": Goal(1, is_upper=True),
        "sample.well_formed.ratio": Goal(1, is_upper=True),
        "round.ratio_to_first": Goal(0.5, is_upper=True),
        "rollout.extra_tokens": Goal(0, is_upper=True),
        "round.distinct_versions": Goal(1, is_upper=True),
        "beside.serving_ratio": Goal(0.75),
        "beside.rested_serving_ratio": Goal(1 - RESTED_SHARE / 2),
        "kill.places": Goal(10),
        "kill.fewest_kills_at_a_place": Goal(20),
        "kill.wrong_states": Goal(0, is_upper=True),
    },
    failures=(NotInstalled, NoHistory, CallsFailed, NotTaken),
)


def main(
    part: Annotated[list[str], typer.Option(help="All unless given.")] = [],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Of every measurement.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the demo that makes the policy.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where results and logs go.")] = Path("runs/bench"),
) -> None:
    """Measure, and write learning.json: other parts are as they were measured last.

    Once all are there, the table in docs/benchmarks.md is written too.
    """

    def measure(found: Midway, _dtype: str, name: str, work: Path) -> dict[str, Figure]:
        return PARTS[name](Work(found, repeats, work, folder))

    LEARNING.run(measure, dtypes=[], parts=part, repeats=repeats, seed=seed, folder=folder)


if __name__ == "__main__":
    typer.run(main)
