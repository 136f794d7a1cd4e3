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
    sample,
)
from loadtest.figures import Figure
from loadtest.work import Work
from thumbloop.processes import ProcessFailed


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([(0, 0.35), (256, 0.75), (512, 0.95)], 256 + 128),  # half way from 0.75 to 0.95
        ([(0, 0.35), (256, 0.85)], 256),
        ([(0, 0.9)], 0),
        ([(0, 0.35), (256, 0.84)], inf),
        ([(0, 0.35), (256, 0.85), (512, 0.5), (768, 0.9)], 256),  # the first time counts
    ],
)
def test_episodes_are_counted_up_to_where_the_rate_crosses_the_goal(
    rates: list[tuple[int, float]], expected: float
):
    assert episodes_to(0.85, rates) == pytest.approx(expected)


def learned(*episodes: float) -> list[Learned]:
    return [Learned(each, 2048) for each in episodes]


def test_seeds_are_compared_one_by_one():
    found = describe_episodes(learned(100, 300, 200), learned(200, 300, 800))
    assert found["sample.ratio"] == Figure(0.5, 0.25, 1.0)
    assert found["sample.ours_episodes"].value == 200
    assert found["sample.trl_0_11_episodes"].value == 300


def test_a_peer_that_never_pleases_counts_as_if_its_last_episode_had():
    found = describe_episodes(learned(1024), learned(inf))
    assert found["sample.ratio"].value == 0.5
    assert found["sample.trl_0_11_not_there"].value == 1


def test_ours_that_never_pleases_is_no_figure():
    with pytest.raises(ProcessFailed, match="did not please within 2048 episodes"):
        describe_episodes(learned(100, inf), learned(100, 100))


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
        return {"rates": [[0, 0.0], *([] if episodes == inf else [[episodes, 0.5]])]}

    monkeypatch.setattr(episodes, "environment", lambda name, folder: folder / name / "python")
    monkeypatch.setattr(Work, "measured", measured)
    found = sample(work)
    assert found["sample.ratio"].value == 0.5
    assert found["sample.reward_auroc"].value == 0.9
    assert found["sample.trl_0_11_learning_rate"].value == 1e-3
    assert found["sample.trl_0_11_epochs"].value == 4
    of_peer = [(seed, setting) for name, seed, setting in asked if name == "trl"]
    assert of_peer[: len(PEER_SETTINGS)] == [(0, setting) for setting in PEER_SETTINGS]
    assert of_peer[len(PEER_SETTINGS) :] == [(1, Setting(1e-3, 4)), (2, Setting(1e-3, 4))]
    assert [(seed, setting) for name, seed, setting in asked if name == "ours"] == [
        (seed, Setting(0.1, 1)) for seed in SEEDS
    ]
