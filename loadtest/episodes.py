"""How many episodes a policy needs to please, by our update and by TRL 0.11's, with one reward model."""

import json
import shutil
import sys
from collections.abc import Sequence
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
    """After how many episodes a policy pleased, infinite where it never did, and how many there were at most."""

    episodes: float
    most: int


def sample(work: Work) -> dict[str, Figure]:
    """Episodes until the policy pleases, ours over the peer's."""
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
        episodes = task["candidates"] * sum(map(len, task["updates"]))
        return Learned(episodes_to(task["goal"], found["rates"]), episodes)

    def ours(seed: int) -> Learned:
        return learn("ours", [sys.executable, "-m", "experiments.episodes"], seed, None)

    def peer(seed: int, setting: Setting) -> Learned:
        return learn("trl", [str(python), "-m", "loadtest.trl.learn_0_11"], seed, setting)

    tried = {setting: peer(SEEDS[0], setting) for setting in PEER_SETTINGS}
    best = min(tried, key=lambda setting: tried[setting].episodes)
    peers = [tried[best], *(peer(seed, best) for seed in SEEDS[1:])]
    return {
        **describe_episodes([ours(seed) for seed in SEEDS], peers),
        "sample.reward_auroc": figures.exactly(auroc),
        "sample.trl_0_11_learning_rate": figures.exactly(best.learning_rate),
        "sample.trl_0_11_epochs": figures.exactly(best.epochs),
    }


def episodes_to(goal: float, rates: Sequence[Sequence[float]]) -> float:
    """Return after how many episodes a rate reached a goal, between two measurements on a straight line.

    `rates` are pairs of episodes and rate, in order. Infinite where it never did.
    """
    before = rates[0]
    for now in rates:
        if now[1] >= goal:
            share = (goal - before[1]) / (now[1] - before[1]) if now is not before else 0.0
            return before[0] + share * (now[0] - before[0])
        before = now
    return float("inf")


def describe_episodes(ours: Sequence[Learned], peers: Sequence[Learned]) -> dict[str, Figure]:
    """Return what seeds amount to. A peer that did not please counts as if it had after its last episode.

    Raises ProcessFailed: ours did not.
    """
    if any(each.episodes > each.most for each in ours):
        raise ProcessFailed(f"ours did not please within {ours[0].most} episodes: {ours}")
    own = [each.episodes for each in ours]
    bounded = [min(each.episodes, each.most) for each in peers]
    return {
        "sample.ratio": figures.ratio(own, bounded),
        "sample.ours_episodes": figures.of_repeats(own),
        "sample.trl_0_11_episodes": figures.of_repeats(bounded),
        "sample.trl_0_11_not_there": figures.exactly(
            sum(each.episodes > each.most for each in peers)
        ),
    }
