"""What trainers of TRL are given and how they are measured, the same for all of them.

Runs in environments that have none of the packages that ours need.
"""

import json
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""How far log-probabilities may be from the sampler's before the update, nats."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response, token ids, with its log-probabilities at sampling and its score."""

    prompt: Tensor
    response: Tensor
    logprobs: Tensor
    score: Tensor


@dataclass(frozen=True, slots=True)
class Job:
    """One update's work."""

    model: str
    version: Path
    rank: int
    alpha: float
    rollouts: Sequence[Rollout]
    epochs: int
    minibatch: int
    learning_rate: float
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def optimizer_steps(self) -> int:
        """Return how many steps the epochs are made of."""
        return self.epochs * (len(self.rollouts) // self.minibatch)


def read(path: Path) -> Job:
    """Return what a file says, and compute on as many threads as it says from now on."""
    found = json.loads(path.read_text())
    torch.set_num_threads(found["threads"])
    if any(each["temperature"] != 1 for each in found["rollouts"]):
        raise SystemExit("error: TRL 0.11 knows no temperature: rollouts have to be sampled at 1")
    if len(found["rollouts"]) % found["minibatch"]:
        raise SystemExit("error: TRL leaves out what does not fill a minibatch")
    return Job(
        model=found["model"],
        version=Path(found["version"]),
        rank=found["lora"]["rank"],
        alpha=found["lora"]["alpha"],
        rollouts=[
            Rollout(*(torch.tensor(each[n]) for n in ("prompt", "response", "logprobs", "score")))
            for each in found["rollouts"]
        ],
        epochs=found["epochs"],
        minibatch=found["minibatch"],
        learning_rate=found["learning_rate"],
        device=found["device"],
        dtype=found["dtype"],
    )


def open_policy(job: Job) -> Any:
    """Return the base model with the version's policy adapter, to be trained on."""
    return open_model(job.model, job.rank, job.alpha, job.version / "policy", job.dtype)


def open_model(
    folder: str, rank: int, alpha: float, adapter: Path | None = None, dtype: str = "float32"
) -> Any:
    """Return a base model with an adapter of a version's, or with an untrained one.

    The adapter's own configuration names settings that an older PEFT does not know.
    """
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    # By the name that releases from 4.45 to 5.24 know.
    base = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    model = get_peft_model(base, lora)
    if adapter is not None:
        weights = load_file(adapter / "adapter_model.safetensors")
        if set_peft_model_state_dict(model, weights).unexpected_keys:
            raise SystemExit(f"error: {adapter} does not fit the base model")
    return model


def open_tokenizer(model: str) -> Any:
    """Return a base model's tokenizer that only pads: the work is in token ids."""
    config = AutoConfig.from_pretrained(model)
    pad, end = (str(i) for i in (config.pad_token_id, config.eos_token_id))
    vocabulary = {str(i): i for i in range(config.vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=pad)),
        pad_token=pad,
        eos_token=end,
    )


def check_agreement(job: Job, logprobs: Sequence[Tensor]) -> None:
    """Make sure that the policy is the one that sampled, by its log-probabilities of responses."""
    apart = max(
        float((own.cpu() - rollout.logprobs).abs().max())
        for own, rollout in zip(logprobs, job.rollouts, strict=True)
    )
    if not apart <= _TOLERANCE[job.dtype]:
        raise SystemExit(f"error: log-probabilities are {apart:.2g} nats from the sampler's")


def measure(
    job: Job, trained: nn.Module, optimizer: torch.optim.Optimizer, update: Callable[[], object]
) -> None:
    """Time an update after one that warms up, both from the same weights; print a line of JSON.

    Steps are counted where they are taken: what a trainer reports of them may be otherwise.
    """
    steps: list[bool] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(True))
    parameters = [p for p in trained.parameters() if p.requires_grad]
    first = [p.detach().clone() for p in parameters]
    forget_peak()
    before_bytes, seconds = peak_bytes(), 0.0
    for _ in ("warm-up", "timed"):
        with torch.no_grad():
            for parameter, weights in zip(parameters, first, strict=True):
                parameter.copy_(weights)
        steps.clear()
        started = clock()
        update()
        seconds = clock() - started
        if len(steps) != job.optimizer_steps:
            raise SystemExit(
                f"error: {len(steps)} optimizer steps instead of {job.optimizer_steps}"
            )
        if not all(bool(p.isfinite().all()) for p in parameters):
            raise SystemExit("error: the update broke down, weights are no longer finite")
    line = {
        "seconds": [seconds],
        "optimizer_steps": len(steps),
        "peak_bytes": peak_bytes(),
        "before_bytes": before_bytes,
    }
    print(json.dumps(line))


def clock() -> float:
    """Return the seconds of a clock, once a GPU has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()


def forget_peak() -> None:
    """Let a GPU's peak begin here: what was made ready is no part of an update."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Return the most memory that this process has had, a GPU's where it computes on one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
