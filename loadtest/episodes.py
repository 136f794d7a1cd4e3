"""How many episodes a policy needs to please, by our update and by TRL 0.11's, with one reward model."""

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from loadtest import figures
from loadtest.environments import environment
from loadtest.figures import Figure
from loadtest.steps import PEERS
from loadtest.work import Work
from thumbloop.processes import ProcessFailed

SEEDS = (0, 1, 2)


class Steps(NamedTuple):
    """How large an update's steps are, and how often each episode is learned from."""

    learning_rate: float
    epochs: int


PEER_STEPS = (
    Steps(1e-3, 4),
    Steps(3e-3, 2),
    Steps(3e-3, 4),
    Steps(1e-2, 2),
    Steps(1e-2, 4),
)
"""What is tried for the peer with the first seed; the best is taken. Four epochs are its default."""


class Reached(NamedTuple):
    """After how many episodes a rate was reached, infinite where it never was, and the least share of replies
    that was well-formed after any update up to then."""

    episodes: float
    well_formed: float


class Learned(NamedTuple):
    """When replies were liked, and when they were liked and well-formed, of at most so many episodes."""

    liked: Reached
    both: Reached
    most: int


Best = Mapping[str, Steps]
"""The peer's best steps, by `liked` and by `both`."""


def sample(work: Work) -> dict[str, Figure]:
    """Episodes until replies are liked, ours over the peer's, and until they are liked and well-formed."""
    python = environment(PEERS["trl_0_11"], work.shared / "environments")
    tasks = work.folder / "tasks"
    shutil.rmtree(tasks, ignore_errors=True)
    write = ["-m", "experiments.tasks", str(work.found.model), str(tasks)]
    auroc = work.measured("tasks", [sys.executable, *write, "--seeds", str(len(SEEDS))])["auroc"]

    def learn(name: str, command: Sequence[str], seed: int, steps: Steps | None) -> Learned:
        task = json.loads((tasks / f"{seed}.json").read_text())
        task |= {} if steps is None else steps._asdict()
        run = f"{name}-{seed}-{task['learning_rate']:g}-{task['epochs']}"
        file = work.folder / f"{run}.task.json"
        file.write_text(json.dumps(task))
        found = work.measured(run, [*command, str(file)])
        (work.folder / f"{run}.json").write_text(json.dumps(found))
        most = task["candidates"] * sum(map(len, task["updates"]))
        return learned(found, task["goal"], most)

    def ours(seed: int) -> Learned:
        return learn("ours", [sys.executable, "-m", "experiments.episodes"], seed, None)

    @cache
    def peer(seed: int, steps: Steps) -> Learned:
        return learn("trl", [str(python), "-m", "loadtest.trl.learn_0_11"], seed, steps)

    best = {
        "liked": min(PEER_STEPS, key=lambda steps: peer(SEEDS[0], steps).liked.episodes),
        "both": min(PEER_STEPS, key=lambda steps: peer(SEEDS[0], steps).both.episodes),
    }
    peers = {name: [peer(seed, steps) for seed in SEEDS] for name, steps in best.items()}
    return {
        **describe_episodes([ours(seed) for seed in SEEDS], peers, best),
        "sample.reward_auroc": figures.exactly(auroc),
    }


def learned(found: Mapping[str, Sequence[float]], goal: float, most: int) -> Learned:
    """Return what a process found before and after each update amounts to."""

    def reached(name: str) -> Reached:
        rates, well_formed = found[name], found["well_formed"]
        i = next((i for i, rate in enumerate(rates) if rate >= goal), None)
        if i is None:
            return Reached(math.inf, min(well_formed[1:], default=well_formed[0]))
        least = min(well_formed[1 : i + 1], default=well_formed[0])
        return Reached(crossing(found["episodes"], rates, i, goal), least)

    return Learned(reached("liked"), reached("both"), most)


def crossing(episodes: Sequence[float], rates: Sequence[float], i: int, goal: float) -> float:
    """Return where the straight line to the i-th rate, the first that is no lower than the goal, meets it."""
    if i == 0:
        return episodes[0]
    share = (goal - rates[i - 1]) / (rates[i] - rates[i - 1])
    return episodes[i - 1] + share * (episodes[i] - episodes[i - 1])


def describe_episodes(
    ours: Sequence[Learned], peers: Mapping[str, Sequence[Learned]], best: Best
) -> dict[str, Figure]:
    """Return what seeds amount to. A peer that never got there counts as if it had after its last episode.

    Raises ProcessFailed: ours never got there.
    """
    found: dict[str, Figure] = {}
    for name, of in peers.items():
        own = [getattr(each, name) for each in ours]
        theirs = [getattr(each, name) for each in of]
        if any(each.episodes == math.inf for each in own):
            raise ProcessFailed(f"ours never got there within {ours[0].most} episodes: {own}")
        bounded = [min(x.episodes, each.most) for x, each in zip(theirs, of, strict=True)]
        key = "sample" if name == "liked" else "sample.well_formed"
        found |= {
            f"{key}.ratio": figures.ratio([each.episodes for each in own], bounded),
            f"{key}.ours_episodes": figures.of_repeats([each.episodes for each in own]),
            f"{key}.ours_well_formed": figures.of_repeats([each.well_formed for each in own]),
            f"{key}.trl_0_11_episodes": figures.of_repeats(bounded),
            f"{key}.trl_0_11_well_formed": figures.of_repeats(
                [each.well_formed for each in theirs]
            ),
            f"{key}.trl_0_11_not_there": figures.exactly(
                sum(each.episodes == math.inf for each in theirs)
            ),
            f"{key}.trl_0_11_learning_rate": figures.exactly(best[name].learning_rate),
            f"{key}.trl_0_11_epochs": figures.exactly(best[name].epochs),
        }
    return found
