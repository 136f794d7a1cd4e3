"""python -m experiments.frozen: a round's rollouts and scores as a file, to compare updates on.

Trainers that know nothing of the store or of our packages read it too.
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import BaseModel
from sqlalchemy import Connection
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from experiments.sampling import rollout_of, sample
from thumbloop.config import State, TrainerConfig
from thumbloop.config.trainer import Lora, Resources
from thumbloop.errors import ThumbloopError, UnknownPolicyVersion
from thumbloop.rendering import verdict_tokens
from thumbloop.store import interactions, open_store, reading, versions
from thumbloop.types import BASE_VERSION, DEFAULT_POLICY
from trainer.assembly import decoder, end_tokens
from trainer.calibration import Calibration
from trainer.components import forged, mix, rewards_of
from trainer.models import Trunk
from trainer.rollouts import Rollout

MAX_TOKENS = 64
"""Of a reply; the demo's."""


class TooFew(Exception):
    """Users asked less than a round; the message says how much."""


class Scored(BaseModel, frozen=True, extra="forbid"):
    """One rollout, token ids, with the sampler's log-probabilities and its reward in logits."""

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
    device: str = "cpu"
    dtype: str = "float32"

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
    config: TrainerConfig, model: Path, number: int, *, prompts: int, candidates: int, seed: int = 0
) -> Job:
    """Return what a version samples for prompts that users asked, scored as its next round would.

    The replies it gave then are too few for a round where the next version came soon. Raises
    TooFew, and UnknownPolicyVersion.
    """
    database = open_store(config.state)
    try:
        with reading(database) as connection:
            parent = versions.get(connection, DEFAULT_POLICY, number)
            if parent is None:
                raise UnknownPolicyVersion(f"there is no version {number} in {config.state.folder}")
            asked = asked_prompts(connection)[:prompts]
    finally:
        database.dispose()
    if len(asked) < prompts:
        raise TooFew(f"users asked {len(asked)} prompts, {prompts} are needed")
    torch.set_num_threads(config.resources.threads)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    verdict = verdict_tokens(config.verdict, tokenizer)
    trunk = Trunk.open(model, config.lora, verdict, Resources(device="cpu"))
    trunk.load(config.state.versions / parent.folder)
    repeated = [prompt for prompt in asked for _ in range(candidates)]
    end = end_tokens(model, trunk, tokenizer)
    samples = sample(trunk, repeated, end=end, max_tokens=MAX_TOKENS, seed=seed)
    rollouts = [rollout_of(*each, number) for each in zip(repeated, samples, strict=True)]
    parts = rewards_of(
        trunk,
        rollouts,
        config.rewards,
        Calibration.of(parent.metrics),
        decoder(tokenizer),
    )
    scores: list[float] = mix(parts, config.rewards, forged(trunk, rollouts)).tolist()
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


def asked_prompts(connection: Connection) -> list[tuple[int, ...]]:
    """Return the prompts whose replies may train the policy, oldest first, none twice."""
    stored = interactions.list_since(connection, DEFAULT_POLICY, BASE_VERSION)
    return list(dict.fromkeys(each.prompt_token_ids for each in stored if each.trainable))


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
    version: Annotated[int, typer.Argument(min=1, help="Whose rollouts, and which is trained.")],
    job: Annotated[Path, typer.Argument(help="The file to write.")],
    prompts: Annotated[int, typer.Option(min=1)] = 64,
    candidates: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 4,
) -> None:
    """Freeze a round's rollouts by a version, scored by its reward model."""
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
