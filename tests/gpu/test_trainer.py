"""The trainer on a GPU: `make test ACCELERATOR=gpu`. Half precision, so numbers agree roughly."""

from pathlib import Path

import pytest
import torch

from tests.rows import version
from thumbloop.config import Verdict
from thumbloop.config.trainer import Lora, Ppo, Resources
from thumbloop.rendering import verdict_tokens
from trainer.batches import collate
from trainer.measure import measure
from trainer.models import Trunk
from trainer.rollouts import Rollout
from trainer.update import PpoObjective

pytestmark = pytest.mark.gpu

PAIRS = [((40, 41, 42), (50, 51, 52, 53)), ((60, 61), (70, 71))]


def open_trunk(model: Path, device: str, dtype: str) -> Trunk:
    from transformers import AutoTokenizer

    verdict = verdict_tokens(Verdict(), AutoTokenizer.from_pretrained(model))
    return Trunk.open(
        model, Lora(rank=4, alpha=8.0), verdict, Resources(device=device, dtype=dtype)
    )


def test_half_precision_on_the_gpu_says_about_what_the_cpu_says(tiny_model: Path):
    said = []
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        trunk = open_trunk(tiny_model, device, dtype)
        batch = collate(PAIRS).to(trunk.device)
        one = torch.ones(len(PAIRS), 1, device=trunk.device)
        with torch.no_grad():
            logprobs = trunk.respond(batch, one, "policy").logprobs
        said.append(logprobs[batch.mask].float().cpu())
    torch.testing.assert_close(said[1], said[0], atol=0.3, rtol=0.05)


def test_an_update_moves_the_policy_and_nothing_breaks(tiny_model: Path):
    trunk = open_trunk(tiny_model, "cuda", "auto")
    assert trunk.dtype is torch.bfloat16
    before = trunk.snapshot("policy")
    batch = collate(PAIRS).to(trunk.device)
    with torch.no_grad():
        one = torch.ones(len(PAIRS), 1, device=trunk.device)
        sampled = trunk.respond(batch, one, "policy").logprobs.float().cpu()
    rollouts = [
        Rollout(f"r{i}", 0, prompt, response, tuple(sampled[i, : len(response)].tolist()), 1.0)
        for i, (prompt, response) in enumerate(PAIRS)
    ]
    metrics = PpoObjective(Ppo()).improve(
        trunk,
        rollouts,
        measure(trunk, rollouts),
        torch.tensor([2.0, -2.0]),
        parent=version(0, None, metrics={}),
        generator=torch.Generator().manual_seed(0),
    )
    assert metrics["optimizer_steps"] > 0
    after = trunk.snapshot("policy")
    assert any(not torch.equal(before[name], after[name]) for name in before)
