"""What TRL's trainers are given, and what is said of their updates; TRL is not needed here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loadtest.trl.frozen import Job, Rollout, check_agreement, measure, open_tokenizer

ROLLOUTS = [
    Rollout(torch.tensor([7, 8]), torch.tensor([9, 1]), torch.tensor([-0.5, -1.5]), torch.tensor(0))
] * 4


def job(model: Path = Path("model")) -> Job:
    return Job(str(model), Path("version"), 4, 8.0, ROLLOUTS, 2, 2, 1e-3)


class Update:
    """Steps an optimizer as often as it is told, each time from where it is."""

    def __init__(self, steps: int, gradient: float = 1.0) -> None:
        self.trained = torch.nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.trained.parameters(), lr=0.5)
        self.first: list[float] = []
        self._steps, self._gradient = steps, gradient

    def __call__(self) -> None:
        self.first.append(self.trained.weight.item())
        for _ in range(self._steps):
            self.trained.weight.grad = torch.tensor([[self._gradient]])
            self.optimizer.step()


def test_an_update_is_timed_after_one_from_the_same_weights(capsys: pytest.CaptureFixture[str]):
    update = Update(steps=4)
    measure(job(), update.trained, update.optimizer, update)
    line = json.loads(capsys.readouterr().out)
    assert line["optimizer_steps"] == 4
    assert len(line["seconds"]) == 1
    assert line["seconds"][0] > 0
    assert 0 < line["before_bytes"] <= line["peak_bytes"]
    assert len(update.first) == 2
    assert update.first[0] == update.first[1]


def test_steps_that_a_trainer_did_not_take_are_missed():
    update = Update(steps=3)
    with pytest.raises(SystemExit, match="3 optimizer steps instead of 4"):
        measure(job(), update.trained, update.optimizer, update)


def test_an_update_that_broke_down_is_none():
    update = Update(steps=4, gradient=float("nan"))
    with pytest.raises(SystemExit, match="no longer finite"):
        measure(job(), update.trained, update.optimizer, update)


def test_a_policy_that_is_not_the_sampler_is_refused():
    sampled = [rollout.logprobs for rollout in ROLLOUTS]
    check_agreement(job(), [row + 5e-4 for row in sampled])
    with pytest.raises(SystemExit, match=r"0\.002 nats from the sampler's"):
        check_agreement(job(), [*sampled[:3], sampled[3] - 2e-3])
    with pytest.raises(SystemExit, match="nan nats"):
        check_agreement(job(), [row * float("nan") for row in sampled])


def test_half_precision_may_be_further_from_the_sampler():
    half = replace(job(), dtype="bfloat16")
    sampled = [rollout.logprobs for rollout in ROLLOUTS]
    check_agreement(half, [row + 0.05 for row in sampled])
    with pytest.raises(SystemExit, match=r"0\.2 nats from the sampler's"):
        check_agreement(half, [row + 0.2 for row in sampled])


def test_the_tokenizer_pads_with_the_models_own_token(tiny_model: Path):
    tokenizer = open_tokenizer(str(tiny_model))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    padded = tokenizer.pad({"input_ids": [[7], [8, 9]]})
    assert padded["input_ids"] == [[7, 0], [8, 9]]
