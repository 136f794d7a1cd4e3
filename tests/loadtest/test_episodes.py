"""How many episodes a policy needed, by its rates after each update; it is no test of either trainer."""

import json
from math import inf
from pathlib import Path
from typing import Any

import pytest

from loadtest import episodes
from loadtest.episodes import (
    PEER_SETTINGS,
    SEEDS,
    Learned,
    Setting,
    describe_episodes,
    episodes_to,
    learned,
    sample,
)
from loadtest.figures import Figure
from loadtest.work import Work
from thumbloop.processes import ProcessFailed


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
    assert episodes_to(0.85, [0, 256, 512, 768], rates) == pytest.approx(expected)


def test_a_process_says_when_replies_were_liked_and_when_they_were_well_formed_too():
    found = {
        "episodes": [0, 100, 200, 300],
        "liked": [0.0, 0.5, 1.0, 1.0],
        "well_formed": [1.0, 0.25, 0.5, 0.75],
        "both": [0.0, 0.25, 0.5, 0.75],
    }
    assert learned(found, 0.75, 1000) == Learned(150, 300, 0.25, 1000)


def of(*episodes: float) -> list[Learned]:
    return [Learned(each, 2 * each, 0.9, 2048) for each in episodes]


BEST = {"liked": Setting(3e-3, 4), "both": Setting(1e-3, 2)}


def test_seeds_are_compared_one_by_one():
    peers = {"liked": of(200, 300, 800), "both": of(100, 300, 800)}
    found = describe_episodes(of(100, 300, 200), peers, BEST)
    assert found["sample.ratio"] == Figure(0.5, 0.25, 1.0)
    assert found["sample.well_formed.ratio"] == Figure(1.0, 0.25, 1.0)
    assert found["sample.ours_episodes"].value == 200
    assert found["sample.trl_0_11_episodes"].value == 300
    assert found["sample.well_formed.trl_0_11_episodes"].value == 600
    assert found["sample.trl_0_11_learning_rate"].value == 3e-3
    assert found["sample.well_formed.trl_0_11_epochs"].value == 2
    assert found["sample.ours_well_formed"].value == 0.9


def test_a_peer_that_never_is_good_enough_counts_as_if_it_was_at_its_last_episode():
    found = describe_episodes(of(512), {"liked": of(1024), "both": of(inf)}, BEST)
    assert found["sample.well_formed.ratio"].value == 2 * 512 / 2048
    assert found["sample.well_formed.trl_0_11_not_there"].value == 1
    assert found["sample.trl_0_11_not_there"].value == 0


def test_ours_that_never_is_good_enough_is_no_figure():
    with pytest.raises(ProcessFailed, match="not good enough within 2048 episodes"):
        describe_episodes(of(100, inf), {"liked": of(100, 100)}, BEST)


def test_the_peer_has_the_setting_that_was_best_for_it(work: Work, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, int, Setting]] = []
    needed = dict(zip(PEER_SETTINGS, (900, 800, 400, 700, inf), strict=True))
    task = {"goal": 0.5, "updates": [[[7], [8]]], "candidates": 512, "learning_rate": 0.1}

    def measured(_self: Work, _name: str, command: list[str]) -> dict[str, Any]:
        if "experiments.tasks" in command:
            tasks = Path(command[4])
            tasks.mkdir()
            for seed in SEEDS:
                (tasks / f"{seed}.json").write_text(json.dumps({**task, "epochs": 1, "seed": seed}))
            return {"auroc": 0.9}
        given = json.loads(Path(command[-1]).read_text())
        setting = Setting(given["learning_rate"], given["epochs"])
        name = "ours" if "experiments.episodes" in command else "trl"
        asked.append((name, given["seed"], setting))
        episodes = 200 if name == "ours" else needed[setting]
        rates = [0.0] if episodes == inf else [0.0, 0.5]
        both = rates if setting != Setting(1e-3, 4) else [0.0, 0.0]  # that one breaks the language
        columns = {"liked": rates, "both": both, "well_formed": rates}
        return {"episodes": [0, episodes], **columns}

    monkeypatch.setattr(episodes, "environment", lambda name, folder: folder / name / "python")
    monkeypatch.setattr(Work, "measured", measured)
    found = sample(work)
    assert found["sample.ratio"].value == 0.5
    assert found["sample.well_formed.ratio"].value == 200 / 700
    assert found["sample.reward_auroc"].value == 0.9
    of_peer = [(seed, setting) for name, seed, setting in asked if name == "trl"]
    assert of_peer[: len(PEER_SETTINGS)] == [(0, setting) for setting in PEER_SETTINGS]
    assert of_peer[len(PEER_SETTINGS) :] == [
        (seed, setting) for setting in (Setting(1e-3, 4), Setting(3e-3, 2)) for seed in (1, 2)
    ]
    assert [(seed, setting) for name, seed, setting in asked if name == "ours"] == [
        (seed, Setting(0.1, 1)) for seed in SEEDS
    ]
