"""A task that policies are compared on: its reward model, and our update learning from it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from demo import judging, preferences
from demo.corpus import train_prompts
from experiments import episodes, tasks
from experiments.episodes import Learner, Question, Task
from loadtest.trl.rewards import RewardModel
from tests.experiments.conftest import PROMPTS
from thumbloop.config import TrainerConfig, Verdict
from thumbloop.rendering import verdict_tokens
from trainer import reward


@pytest.fixture(scope="module")
def task(learned: TrainerConfig, tiny_model: Path) -> Task:
    asked = tuple(PROMPTS[:2])
    return Task(
        model=tiny_model,
        adapters=next((learned.state.versions / "default").iterdir()),
        lora=learned.lora,
        verdict=verdict_tokens(Verdict(), AutoTokenizer.from_pretrained(tiny_model)),
        preference="praise",
        updates=(asked, asked, asked),
        candidates=2,
        known=(),
        held_out=(Question(text="How was it?", tokens=PROMPTS[3]),),
        goal=0.5,
        max_tokens=6,
        epochs=1,
        minibatch=4,
        learning_rate=1e-3,
        threads=1,
        seed=0,
    )


def said(task: Task, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[list[float]]:
    (folder / "task.json").write_text(task.model_dump_json())
    episodes.main(folder / "task.json")
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["both"] == line["liked"]
    return [list(row) for row in zip(line["episodes"], line["liked"], strict=True)]


def test_it_learns_until_it_has_seen_enough(
    task: Task,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(judging, "is_well_formed", lambda _reply: True)
    monkeypatch.setitem(preferences.SHIPPED, "praise", lambda _prompt, _reply: 0.25)
    assert said(task, tmp_path, capsys) == [[0, 0.25], [4, 0.25], [8, 0.25], [12, 0.25]]


def test_it_stops_once_it_pleases(
    task: Task,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(judging, "is_well_formed", lambda _reply: True)
    likes = iter([0.25, 0.25, 0.75])
    monkeypatch.setitem(preferences.SHIPPED, "praise", lambda _prompt, _reply: next(likes))
    assert said(task, tmp_path, capsys) == [[0, 0.25], [4, 0.25], [8, 0.75]]


def test_the_policy_begins_untrained_and_is_all_that_moves(task: Task):
    learner = Learner(task)
    trunk = learner._trunk
    assert all(
        not weights.any()
        for name, weights in trunk.parameters("policy").items()
        if "lora_B" in name
    )
    rewards = trunk.snapshot("reward")
    assert any(weights.any() for name, weights in rewards.items() if "lora_B" in name)
    assert learner.update(task.updates[0]) == 4
    assert all(torch.equal(p, rewards[name]) for name, p in trunk.parameters("reward").items())
    assert any(
        weights.any() for name, weights in trunk.parameters("policy").items() if "lora_B" in name
    )


def test_both_trainers_get_the_same_rewards(task: Task):
    pairs = [((7, 8), (9, 10, 1)), ((12,), (13,)), ((14, 15, 16), (17, 18))]
    ours = reward.score(Learner(task)._trunk, pairs)
    model = RewardModel(json.loads(task.model_dump_json()))
    theirs = model(
        [torch.tensor(prompt) for prompt, _ in pairs],
        [torch.tensor(response) for _, response in pairs],
    )
    assert len(set(ours.tolist())) == 3
    assert torch.stack(theirs).tolist() == pytest.approx(ours.tolist(), abs=1e-4)
    known = [
        {"prompt": prompt, "response": response, "reward": worth}
        for (prompt, response), worth in zip(pairs, ours.tolist(), strict=True)
    ]
    model.check(known)
    with pytest.raises(SystemExit, match=r"rewards are 0\.5 logits from those of the task"):
        model.check([*known[:2], known[2] | {"reward": known[2]["reward"] + 0.5}])


def test_tasks_share_a_reward_model_that_was_fitted_and_differ_in_what_is_asked(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "tasks"
    tasks.main(
        tiny_model, folder, "brevity", thumbs=16, seeds=2, updates=3, prompts=2, candidates=2
    )
    assert 0 <= json.loads(capsys.readouterr().out.splitlines()[-1])["auroc"] <= 1
    first, second = (Task.model_validate_json((folder / f"{i}.json").read_text()) for i in (0, 1))
    assert [len(prompts) for prompts in first.updates] == [2, 2, 2]
    assert first.adapters == second.adapters
    assert first.updates != second.updates
    assert len(first.known) == 16
    assert not {each.text for each in first.held_out} & set(train_prompts(6, 0))
    moved = Learner(first)._trunk.parameters("reward")
    assert any(weights.any() for name, weights in moved.items() if "lora_B" in name)
