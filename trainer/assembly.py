"""Settings -> a loop that is ready to run: what the application and the experiments put together alike."""

from collections.abc import Callable, Mapping
from pathlib import Path
from time import time
from typing import Any, NamedTuple

from rich.console import Console
from sqlalchemy import Engine
from transformers import AutoTokenizer, GenerationConfig

from thumbloop.artifacts import BaseModelIdentity
from thumbloop.base_model import claim_base, identify
from thumbloop.config import TrainerConfig
from thumbloop.rendering import text_of, verdict_tokens
from thumbloop.types import DEFAULT_POLICY
from trainer import publishing
from trainer.components import Decode
from trainer.learning import Learner
from trainer.loop import Loop
from trainer.metrics import TrainerMetrics
from trainer.models import Trunk
from trainer.objective import Objective
from trainer.parallel import ALONE, Workers
from trainer.policy import PolicyStage
from trainer.update import PpoObjective


class Assembly(NamedTuple):
    """A loop, and the parts of it that others look at."""

    loop: Loop
    trunk: Trunk
    tokenizer: Any
    end: list[int]


OBJECTIVES: Mapping[str, Callable[[TrainerConfig], Objective]] = {
    "ppo": lambda config: PpoObjective(config.ppo)
}
"""What may move the policy, by its name in the settings."""


def assemble(
    config: TrainerConfig,
    folder: Path,
    engine: Engine,
    metrics: TrainerMetrics,
    workers: Workers = ALONE,
) -> Assembly:
    """Load the base model from its folder, prepare the version folders, build the loop.

    Only the one trainer of a state folder may call it, of its processes the first. Raises SettingsError,
    StoreUnavailable.
    """
    base = identify(folder)
    prepare_versions(engine, config, base)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    trunk = open_trunk(config, folder, tokenizer, workers)
    end = end_tokens(folder, trunk, tokenizer)
    special = set(tokenizer.all_special_ids)
    vocabulary = [i for i in range(len(tokenizer)) if i not in special]
    learner = new_learner(config, trunk, base, metrics, decoder(tokenizer))
    loop = Loop(config, engine, trunk, learner, base, metrics, vocabulary=vocabulary, end=end)
    return Assembly(loop, trunk, tokenizer, end)


def follow(config: TrainerConfig, folder: Path, workers: Workers) -> None:
    """Compute the share of one of several processes, in every round that the first one tells of."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    trunk = open_trunk(config, folder, tokenizer, workers)
    silent = TrainerMetrics(None, Console(quiet=True))
    learner = new_learner(config, trunk, identify(folder), silent, decoder(tokenizer))
    while (lesson := workers.tell(None)) is not None:
        learner.learn(lesson, learner.take(lesson))


def open_trunk(config: TrainerConfig, folder: Path, tokenizer: Any, workers: Workers) -> Trunk:
    """Load the base model. Raises SettingsError."""
    verdict = verdict_tokens(config.verdict, tokenizer)
    return Trunk.open(folder, config.lora, verdict, config.resources, workers)


def new_learner(
    config: TrainerConfig,
    trunk: Trunk,
    base: BaseModelIdentity,
    metrics: TrainerMetrics,
    decode: Decode,
) -> Learner:
    """Build what learns in the trunk."""
    objective = OBJECTIVES[config.objective](config)
    policy = PolicyStage(trunk, objective, decode, config, metrics)
    return Learner(trunk, policy, base, config, metrics)


def decoder(tokenizer: Any) -> Decode:
    """Return how a tokenizer's ids are read."""
    return lambda ids: text_of(ids, tokenizer)


def prepare_versions(engine: Engine, config: TrainerConfig, base: BaseModelIdentity) -> None:
    """Write version 0's folder where it is missing, and remove what a killed trainer left behind."""
    claim_base(config.state.versions, DEFAULT_POLICY, base, time())
    publishing.clear(engine, DEFAULT_POLICY, config.state.versions)


def end_tokens(folder: Path, trunk: Trunk, tokenizer: Any) -> list[int]:
    """Return every token that ends a reply, by tokenizer, model and generation settings."""
    sources = [tokenizer.eos_token_id, trunk.causal.config.eos_token_id]
    if (folder / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(str(folder)).eos_token_id)
    return sorted(
        {i for ids in sources for i in (ids if isinstance(ids, list) else [ids]) if i is not None}
    )
