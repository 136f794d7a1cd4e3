"""Our update on a frozen round: what its line says, and when there is none."""

import json
from pathlib import Path

import pytest

from experiments import update
from experiments.frozen import Job, freeze
from thumbloop.config import TrainerConfig


@pytest.fixture(scope="module")
def job(learned: TrainerConfig, tiny_model: Path) -> Job:
    frozen = freeze(learned, tiny_model, 1, prompts=3, candidates=2)
    return frozen.model_copy(update={"minibatch": 2, "learning_rate": 1e-3})


def test_an_update_is_timed_with_all_of_its_steps(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    job.write(tmp_path / "job.json")
    update.main(tmp_path / "job.json", repeats=2)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["optimizer_steps"] == 2 * 6 / 2
    assert [len(line[name]) for name in ("seconds", "passes_s")] == [2, 2]
    for whole, passes in zip(line["seconds"], line["passes_s"], strict=True):
        assert 0 < passes < whole
    assert 100 << 20 < line["before_bytes"] <= line["peak_bytes"]


def test_every_update_starts_from_the_same_weights(job: Job, monkeypatch: pytest.MonkeyPatch):
    updates, first = update.Updates(job), []
    measure = update.measure

    def noted(trunk, rollouts):
        fixed = measure(trunk, rollouts)
        first.append(fixed.prox_logprobs)
        return fixed

    monkeypatch.setattr(update, "measure", noted)
    updates.run()
    updates.run()
    assert first[0].equal(first[1])


def test_an_update_that_skips_steps_is_refused(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    unlike = [
        each.model_copy(update={"logprobs": tuple(-20.0 * i for i in range(len(each.response)))})
        for each in job.rollouts
    ]
    job.model_copy(update={"rollouts": tuple(unlike)}).write(tmp_path / "job.json")
    with pytest.raises(SystemExit) as stopped:
        update.main(tmp_path / "job.json", repeats=1)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: 0 optimizer steps instead of 6")
