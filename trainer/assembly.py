"""Settings -> a loop that is ready to run: what the application and the experiments put together alike."""

from pathlib import Path
from time import time
from typing import Any, NamedTuple

from sqlalchemy import Engine
from transformers import AutoTokenizer, GenerationConfig

from thumbloop.artifacts import BaseModelIdentity
from thumbloop.base_model import claim_base, identify
from thumbloop.config import TrainerConfig
from thumbloop.rendering import text_of, verdict_tokens
from thumbloop.types import DEFAULT_POLICY
from trainer import publishing
from trainer.loop import Loop
from trainer.metrics import TrainerMetrics
from trainer.models import Trunk


class Assembly(NamedTuple):
    """A loop, and the parts of it that others look at."""

    loop: Loop
    trunk: Trunk
    tokenizer: Any
    end: list[int]


def assemble(
    config: TrainerConfig, folder: Path, engine: Engine, metrics: TrainerMetrics
) -> Assembly:
    """Load the base model from its folder, prepare the version folders, build the loop.

    Only the one trainer of a state folder may call it. Raises SettingsError, StoreUnavailable.
    """
    base = identify(folder)
    prepare_versions(engine, config, base)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    trunk = Trunk.open(
        folder,
        config.lora,
        verdict_tokens(config.verdict, tokenizer),
        config.resources,
    )
    end = end_tokens(folder, trunk, tokenizer)
    special = set(tokenizer.all_special_ids)
    vocabulary = [i for i in range(len(tokenizer)) if i not in special]
    loop = Loop(
        config,
        engine,
        trunk,
        base,
        metrics,
        vocabulary=vocabulary,
        end=end,
        decode=lambda ids: text_of(ids, tokenizer),
    )
    return Assembly(loop, trunk, tokenizer, end)


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
