"""python -m experiments.update JOB: our update on frozen rollouts, timed; prints a line of JSON."""

import json
import resource
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from experiments.frozen import Job, Scored
from thumbloop.artifacts import WrittenVersion, read_manifest
from thumbloop.config.trainer import Ppo, Resources
from thumbloop.rendering import VerdictTokens
from trainer.epochs import improve
from trainer.measure import measure
from trainer.models import Trunk
from trainer.rollouts import Rollout
from trainer.update import PpoObjective

_NEVER = 1e9
"""Divergence at which epochs would stop early, nats per token: what is compared is all of them."""


class StepsMissing(Exception):
    """An update took other than all optimizer steps of its epochs; the message says how many."""


class Timed(NamedTuple):
    """Seconds of one update, and of the epochs' passes through the policy alone."""

    seconds: float
    passes_s: float


class Stopwatch:
    """A function, and how many seconds its last call took."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function."""
        started = clock()
        result = self._function(*arguments, **options)
        self.seconds = clock() - started
        return result


class Updates:
    """A job's update, again and again, each from the same adapter and critic."""

    def __init__(self, job: Job, max_share: float = 1.0) -> None:
        """Load the job's version; `max_share` is the trainer's setting."""
        manifest = read_manifest(job.version)
        verdict = manifest.verdict
        assert verdict is not None, "a trained version has a verdict prompt"
        resources = Resources(device=job.device, dtype=job.dtype, max_share=max_share)
        tokens = VerdictTokens(verdict.prompt, verdict.up, verdict.down, is_special=True)
        self._trunk = Trunk.open(job.model, job.lora, tokens, resources)
        self._trunk.load(job.version)
        self._policy, self._head = self._trunk.snapshot("policy"), self._trunk.value_head
        self._parent = WrittenVersion(str(job.version), manifest, manifest_digest="").row()
        self._rollouts = [_rollout(each, manifest.version) for each in job.rollouts]
        self._rewards = torch.tensor([each.score for each in job.rollouts])
        self._steps = job.optimizer_steps
        self._objective = PpoObjective(
            Ppo(
                learning_rate=job.learning_rate,
                epochs=job.epochs,
                minibatch_size=job.minibatch,
                target_kl=_NEVER,
            )
        )

    def run(self) -> Timed:
        """Do it once. Raises StepsMissing."""
        self._trunk.restore("policy", self._policy)
        self._trunk.value_head = deepcopy(self._head)
        passes = Stopwatch(improve)
        with patch("trainer.update.improve", passes):
            started = clock()
            fixed = measure(self._trunk, self._rollouts)
            found = self._objective.improve(
                self._trunk,
                self._rollouts,
                fixed,
                self._rewards,
                parent=self._parent,
                generator=torch.Generator().manual_seed(0),
            )
            seconds = clock() - started
        if found["optimizer_steps"] != self._steps:
            raise StepsMissing(
                f"{found['optimizer_steps']:.0f} optimizer steps instead of {self._steps}: {found}"
            )
        return Timed(seconds, passes.seconds)


def _rollout(scored: Scored, version: int) -> Rollout:
    return Rollout(
        response_id="",
        policy_version=version,
        prompt=scored.prompt,
        response=scored.response,
        logprobs=scored.logprobs,
        temperature=scored.temperature,
        has_eos=scored.has_eos,
    )


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


def main(
    job: Annotated[Path, typer.Argument(help="What `python -m experiments.frozen` wrote.")],
    repeats: Annotated[int, typer.Option(min=1, help="Timed, after one that warms up.")] = 1,
) -> None:
    """Time the update of a job and take its memory."""
    disable_progress_bar()
    frozen = Job.read(job)
    torch.set_num_threads(frozen.threads)
    updates = Updates(frozen)
    forget_peak()
    before_bytes = peak_bytes()
    try:
        _warm_up, *timed = [updates.run() for _ in range(1 + repeats)]
    except StepsMissing as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    line = {
        "seconds": [each.seconds for each in timed],
        "passes_s": [each.passes_s for each in timed],
        "optimizer_steps": frozen.optimizer_steps,
        "peak_bytes": peak_bytes(),
        "before_bytes": before_bytes,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    typer.run(main)
