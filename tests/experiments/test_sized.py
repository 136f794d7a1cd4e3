"""An update's work for a model of any size: tried small, on the CPU, as the GPU's is large."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments import sized, update
from experiments.frozen import Job

TINY = {"hidden": 64, "layers": 2, "vocabulary": 500, "device": "cpu", "prompts": 4}


def make(folder: Path, dtype: str, seed: int = 0) -> Job:
    sized.main(folder / "model", folder / "job.json", dtype=dtype, candidates=2, seed=seed, **TINY)
    return Job.read(folder / "job.json")


def test_its_model_has_half_a_billion_parameters():
    with torch.device("meta"):
        config = sized.config_of(hidden=896, layers=24, vocabulary=151_936)
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == 494_032_768  # Qwen2.5-0.5B's


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_work_is_one_that_an_update_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
):
    job = make(tmp_path, dtype)
    assert len({each.prompt for each in job.rollouts}) == 4
    assert len(job.rollouts) == 8
    assert all(32 <= len(each.response) == len(each.logprobs) <= 128 for each in job.rollouts)
    assert all(max(each.prompt + each.response) < 500 for each in job.rollouts)
    update.main(tmp_path / "job.json", repeats=1)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["optimizer_steps"] == job.optimizer_steps == 2
    assert line["seconds"][0] > 0


def test_its_log_probabilities_are_those_of_the_policy_that_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job, seen = make(tmp_path, "float32"), []
    measure = update.measure

    def noted(trunk, rollouts):
        seen.append(measure(trunk, rollouts))
        return seen[-1]

    monkeypatch.setattr(update, "measure", noted)
    update.Updates(job).run()
    torch.testing.assert_close(seen[0].prox_logprobs, seen[0].old_logprobs)


def test_the_same_seed_makes_the_same_work(tmp_path: Path):
    first = make(tmp_path, "float32").rollouts
    assert make(tmp_path, "float32").rollouts == first
    assert make(tmp_path, "float32", seed=1).rollouts != first
