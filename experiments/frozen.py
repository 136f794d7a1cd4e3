"""python -m experiments.frozen: one round's rollouts and scores as a file, for updates to be compared on.

Trainers that know nothing of the store or of our packages read it too.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import BaseModel
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from thumbloop.config import State, TrainerConfig
from thumbloop.config.trainer import Lora, Resources, Round
from thumbloop.errors import ThumbloopError, UnknownPolicyVersion
from thumbloop.rendering import text_of, verdict_tokens
from thumbloop.store import open_store, reading, versions
from thumbloop.types import DEFAULT_POLICY, PolicyVersion
from trainer import dataset
from trainer.calibration import Calibration
from trainer.components import forged, mix, rewards_of
from trainer.models import Trunk
from trainer.rollouts import Rollout

_NO_LIMIT = 1 << 20


class TooFew(Exception):
    """A version did not answer enough prompts; the message says how many it did."""


class Scored(BaseModel, frozen=True, extra="forbid"):
    """One rollout and its score: token ids, the sampler's log-probabilities, the reward in logits."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    logprobs: tuple[float, ...]
    temperature: float
    has_eos: bool
    score: float


class Job(BaseModel, frozen=True, extra="forbid"):
    """What one update is given; `version` is the folder whose policy adapter is trained on."""

    model: Path
    version: Path
    lora: Lora
    rollouts: tuple[Scored, ...]
    epochs: int
    minibatch: int
    learning_rate: float
    threads: int

    @property
    def optimizer_steps(self) -> int:
        """Return how many steps the epochs are made of."""
        return self.epochs * math.ceil(len(self.rollouts) / self.minibatch)

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Return what a file holds."""
        return cls.model_validate_json(path.read_text())

    def write(self, path: Path) -> None:
        """Write it as a file."""
        path.write_text(self.model_dump_json())


def freeze(
    config: TrainerConfig, model: Path, number: int, *, prompts: int, candidates: int
) -> Job:
    """Return the newest groups of candidates that a version sampled, scored as its next round would.

    Raises TooFew, and UnknownPolicyVersion.
    """
    database = open_store(config.state)
    try:
        with reading(database) as connection:
            parent = versions.get(connection, DEFAULT_POLICY, number)
            if parent is None:
                raise UnknownPolicyVersion(f"there is no version {number} in {config.state.folder}")
            of_parent = Round(max_staleness=0, max_rollouts=_NO_LIMIT)
            read = dataset.read(connection, DEFAULT_POLICY, parent, of_parent)
    finally:
        database.dispose()
    rollouts = whole_groups(read.rollouts, candidates)[-prompts * candidates :]
    if len(rollouts) < prompts * candidates:
        raise TooFew(
            f"version {number} answered {len(rollouts) // candidates} prompts with {candidates}"
            f" whole candidates, {prompts} are needed"
        )
    scores = score(config, model, parent, rollouts)
    return Job(
        model=model,
        version=config.state.versions / parent.folder,
        lora=config.lora,
        rollouts=tuple(map(_scored, rollouts, scores)),
        epochs=config.ppo.epochs,
        minibatch=config.ppo.minibatch_size,
        learning_rate=config.ppo.learning_rate,
        threads=config.resources.threads,
    )


def whole_groups(rollouts: Sequence[Rollout], size: int) -> list[Rollout]:
    """Return the candidates of replies that have `size` of them, all finished, reply by reply."""
    groups = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.response_id].append(rollout)
    whole = [g for g in groups.values() if len(g) == size and all(r.is_finished for r in g)]
    return [rollout for group in whole for rollout in group]


def score(
    config: TrainerConfig, model: Path, parent: PolicyVersion, rollouts: Sequence[Rollout]
) -> list[float]:
    """Return each rollout's reward, mixed of its components, by the version's own reward model."""
    torch.set_num_threads(config.resources.threads)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    verdict = verdict_tokens(config.verdict, tokenizer)
    trunk = Trunk.open(model, config.lora, verdict, Resources(device="cpu"))
    trunk.load(config.state.versions / parent.folder)
    parts = rewards_of(
        trunk,
        rollouts,
        config.rewards,
        Calibration.of(parent.metrics),
        lambda ids: text_of(ids, tokenizer),
    )
    scores: list[float] = mix(parts, config.rewards, forged(trunk, rollouts)).tolist()
    return scores


def _scored(rollout: Rollout, score: float) -> Scored:
    return Scored(
        prompt=rollout.prompt,
        response=rollout.response,
        logprobs=rollout.logprobs,
        temperature=rollout.temperature,
        has_eos=rollout.has_eos,
        score=score,
    )


def main(
    state: Annotated[Path, typer.Argument(help="Folder of store and versions.")],
    model: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    version: Annotated[int, typer.Argument(min=1, help="Whose rollouts.")],
    job: Annotated[Path, typer.Argument(help="The file to write.")],
    prompts: Annotated[int, typer.Option(min=1)] = 64,
    candidates: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 4,
) -> None:
    """Freeze the newest rollouts of a version, scored by its reward model."""
    disable_progress_bar()
    config = TrainerConfig(state=State(folder=state.absolute()))
    try:
        frozen = freeze(config, model.absolute(), version, prompts=prompts, candidates=candidates)
    except (TooFew, ThumbloopError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    frozen.write(job)


if __name__ == "__main__":
    typer.run(main)
