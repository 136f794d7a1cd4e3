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


class Setting(NamedTuple):
    """How large the steps are, and how often each episode is learned from."""

    learning_rate: float
    epochs: int


PEER_SETTINGS = (
    Setting(3e-4, 4),
    Setting(1e-3, 2),
    Setting(1e-3, 4),
    Setting(3e-3, 2),
    Setting(3e-3, 4),
)
"""What is tried for the peer with the first seed; the best is taken. Four epochs are its default."""


class Learned(NamedTuple):
    """After how many episodes a policy's replies were good enough, infinite where they never were.

    `liked` asks that they are liked; `both`, that they are well-formed too. `well_formed` is the least share that
    was after any update, `most` how many episodes there were at most.
    """

    liked: float
    both: float
    well_formed: float
    most: int


Best = Mapping[str, Setting]
"""The peer's best setting, by `liked` and by `both`."""


def sample(work: Work) -> dict[str, Figure]:
    """Episodes until replies are liked, ours over the peer's, and until they are liked and well-formed."""
    python = environment(PEERS["trl_0_11"], work.shared / "environments")
    tasks = work.folder / "tasks"
    shutil.rmtree(tasks, ignore_errors=True)
    write = ["-m", "experiments.tasks", str(work.found.model), str(tasks)]
    auroc = work.measured("tasks", [sys.executable, *write, "--seeds", str(len(SEEDS))])["auroc"]

    def learn(name: str, command: Sequence[str], seed: int, setting: Setting | None) -> Learned:
        task = json.loads((tasks / f"{seed}.json").read_text())
        task |= {} if setting is None else setting._asdict()
        file = work.folder / f"{name}.json"
        file.write_text(json.dumps(task))
        found = work.measured(f"learn-{name}-{seed}", [*command, str(file)])
        most = task["candidates"] * sum(map(len, task["updates"]))
        return learned(found, task["goal"], most)

    def ours(seed: int) -> Learned:
        return learn("ours", [sys.executable, "-m", "experiments.episodes"], seed, None)

    @cache
    def peer(seed: int, setting: Setting) -> Learned:
        return learn("trl", [str(python), "-m", "loadtest.trl.learn_0_11"], seed, setting)

    best = {
        "liked": min(PEER_SETTINGS, key=lambda setting: peer(SEEDS[0], setting).liked),
        "both": min(PEER_SETTINGS, key=lambda setting: peer(SEEDS[0], setting).both),
    }
    peers = {name: [peer(seed, setting) for seed in SEEDS] for name, setting in best.items()}
    return {
        **describe_episodes([ours(seed) for seed in SEEDS], peers, best),
        "sample.reward_auroc": figures.exactly(auroc),
    }


def learned(found: Mapping[str, Sequence[float]], goal: float, most: int) -> Learned:
    """Return what a process found after each update amounts to."""
    liked, both = (episodes_to(goal, found["episodes"], found[name]) for name in ("liked", "both"))
    return Learned(liked, both, min(found["well_formed"]), most)


def episodes_to(goal: float, episodes: Sequence[float], rates: Sequence[float]) -> float:
    """Return after how many episodes rates reached a goal, between two of them on a straight line.

    Infinite where they never did.
    """
    reached = next((i for i, rate in enumerate(rates) if rate >= goal), None)
    if reached is None:
        return math.inf
    if reached == 0:
        return episodes[0]
    before, now = rates[reached - 1], rates[reached]
    first, last = episodes[reached - 1], episodes[reached]
    return first + (goal - before) / (now - before) * (last - first)


def describe_episodes(
    ours: Sequence[Learned], peers: Mapping[str, Sequence[Learned]], best: Best
) -> dict[str, Figure]:
    """Return what seeds amount to. A peer that never was good enough counts as if it was after its last episode.

    Raises ProcessFailed: ours was not.
    """
    if any(math.inf in (each.liked, each.both) for each in ours):
        raise ProcessFailed(f"ours was not good enough within {ours[0].most} episodes: {ours}")
    found = {"sample.ours_well_formed": figures.of_repeats([each.well_formed for each in ours])}
    for name, of in peers.items():
        own = [getattr(each, name) for each in ours]
        theirs = [getattr(each, name) for each in of]
        bounded = [min(x, float(each.most)) for x, each in zip(theirs, of, strict=True)]
        key = "sample" if name == "liked" else "sample.well_formed"
        found |= {
            f"{key}.ratio": figures.ratio(own, bounded),
            f"{key}.ours_episodes": figures.of_repeats(own),
            f"{key}.trl_0_11_episodes": figures.of_repeats(bounded),
            f"{key}.trl_0_11_not_there": figures.exactly(theirs.count(math.inf)),
            f"{key}.trl_0_11_well_formed": figures.of_repeats([each.well_formed for each in of]),
            f"{key}.trl_0_11_learning_rate": figures.exactly(best[name].learning_rate),
            f"{key}.trl_0_11_epochs": figures.exactly(best[name].epochs),
        }
    return found
