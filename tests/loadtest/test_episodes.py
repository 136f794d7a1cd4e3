"""How many episodes a policy needed, by its rates after each update; it is no test of either trainer."""

import json
from math import inf
from pathlib import Path
from typing import Any

import pytest

from loadtest import episodes
from loadtest.episodes import (
    PEER_STEPS,
    SEEDS,
    Learned,
    Reached,
    Steps,
    describe_episodes,
    learned,
    sample,
)
from loadtest.figures import Figure
from loadtest.work import Work
from thumbloop.processes import ProcessFailed


def found(
    liked: list[float], both: list[float], well_formed: list[float] | None = None
) -> dict[str, list[float]]:
    episodes = [256.0 * i for i in range(len(liked))]
    shares = well_formed or [1.0] * len(liked)
    return {"episodes": episodes, "liked": liked, "both": both, "well_formed": shares}


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.35, 0.75, 0.95], 256 + 128),  # half way from 0.75 to 0.95
        ([0.35, 0.85], 256),
        ([0.9], 0),
        ([0.35, 0.84], inf),
        ([0.35, 0.85, 0.5, 0.9], 256),  # the first time counts
    ],
)
def test_episodes_are_counted_up_to_where_the_rate_crosses_the_goal(
    rates: list[float], expected: float
):
    assert learned(found(rates, rates), 0.85, 1024).liked.episodes == pytest.approx(expected)


def test_a_process_says_when_replies_were_liked_and_when_they_were_well_formed_too():
    rates = found([0.0, 0.5, 1.0, 1.0], [0.0, 0.25, 0.25, 0.75], [0.5, 1.0, 0.25, 0.125])
    assert learned(rates, 0.75, 1024) == Learned(Reached(384, 0.25), Reached(768, 0.125), 1024)
    assert learned(found([0.0, 0.5], [0.0, 0.5], [0.1, 0.9]), 0.75, 1024).both == (inf, 0.9)


def of(*episodes: float) -> list[Learned]:
    return [Learned(Reached(each, 0.9), Reached(2 * each, 0.8), 2048) for each in episodes]


BEST = {"liked": Steps(3e-3, 4), "both": Steps(1e-3, 2)}


def test_seeds_are_compared_one_by_one():
    peers = {"liked": of(200, 300, 800), "both": of(100, 300, 800)}
    figures = describe_episodes(of(100, 300, 200), peers, BEST)
    assert figures["sample.ratio"] == Figure(0.5, 0.25, 1.0)
    assert figures["sample.well_formed.ratio"] == Figure(1.0, 0.25, 1.0)
    assert figures["sample.ours_episodes"].value == 200
    assert figures["sample.trl_0_11_episodes"].value == 300
    assert figures["sample.well_formed.trl_0_11_episodes"].value == 600
    assert figures["sample.trl_0_11_learning_rate"].value == 3e-3
    assert figures["sample.well_formed.trl_0_11_epochs"].value == 2
    assert figures["sample.ours_well_formed"].value == 0.9
    assert figures["sample.well_formed.trl_0_11_well_formed"].value == 0.8


def test_a_peer_that_never_gets_there_counts_as_if_it_had_at_its_last_episode():
    figures = describe_episodes(of(512), {"liked": of(1024), "both": of(inf)}, BEST)
    assert figures["sample.well_formed.ratio"].value == 2 * 512 / 2048
    assert figures["sample.well_formed.trl_0_11_not_there"].value == 1
    assert figures["sample.trl_0_11_not_there"].value == 0


def test_ours_that_never_gets_there_is_no_figure():
    with pytest.raises(ProcessFailed, match="never got there within 2048 episodes"):
        describe_episodes(of(100, inf), {"liked": of(100, 100)}, BEST)


def test_the_peer_has_the_steps_that_are_best_for_it(work: Work, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, int, Steps]] = []
    needed = dict(zip(PEER_STEPS, (400, 700, 800, 900, inf), strict=True))
    task = {"goal": 0.5, "updates": [[[7], [8]]], "candidates": 512, "learning_rate": 0.1}

    def measured(_self: Work, _name: str, command: list[str]) -> dict[str, Any]:
        if "experiments.tasks" in command:
            tasks = Path(command[4])
            tasks.mkdir()
            for seed in SEEDS:
                (tasks / f"{seed}.json").write_text(json.dumps({**task, "epochs": 1, "seed": seed}))
            return {"auroc": 0.9}
        given = json.loads(Path(command[-1]).read_text())
        steps = Steps(given["learning_rate"], given["epochs"])
        name = "ours" if "experiments.episodes" in command else "trl"
        asked.append((name, given["seed"], steps))
        episodes = 200 if name == "ours" else needed[steps]
        rates = [0.0] if episodes == inf else [0.0, 0.5]
        both = rates if steps != Steps(1e-3, 4) else [0.0, 0.0]  # that one breaks the language
        columns = {"liked": rates, "both": both, "well_formed": rates}
        return {"episodes": [0, episodes], **columns}

    monkeypatch.setattr(episodes, "environment", lambda name, folder: folder / name / "python")
    monkeypatch.setattr(Work, "measured", measured)
    figures = sample(work)
    assert figures["sample.ratio"].value == 0.5
    assert len(list(work.folder.glob("trl-*.task.json"))) == len(PEER_STEPS) + 4
    assert figures["sample.well_formed.ratio"].value == 200 / 700
    assert figures["sample.reward_auroc"].value == 0.9
    of_peer = [(seed, steps) for name, seed, steps in asked if name == "trl"]
    assert of_peer[: len(PEER_STEPS)] == [(0, steps) for steps in PEER_STEPS]
    assert of_peer[len(PEER_STEPS) :] == [
        (seed, steps) for steps in (Steps(1e-3, 4), Steps(3e-3, 2)) for seed in (1, 2)
    ]
    assert [(seed, steps) for name, seed, steps in asked if name == "ours"] == [
        (seed, Steps(0.1, 1)) for seed in SEEDS
    ]
