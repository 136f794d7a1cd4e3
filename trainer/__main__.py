"""python -m trainer: parse settings, build the loop, learn until told to stop. Wiring only."""

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import Annotated, Any, NoReturn

import torch
import typer
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from thumbloop import artifacts
from thumbloop.base_model import identify, locate
from thumbloop.config import State, TrainerConfig, load
from thumbloop.errors import SettingsError, ThumbloopError
from thumbloop.rendering import verdict_tokens
from thumbloop.store import open_store, reading, versions
from thumbloop.types import DEFAULT_POLICY
from trainer.loop import Loop
from trainer.metrics import TrainerMetrics
from trainer.models import Trunk


class Stopped(BaseException):
    """SIGTERM or SIGINT: a round in progress is dropped, as nothing of it is written yet."""


def train(config: TrainerConfig) -> None:
    """Build everything, then run rounds."""
    resources = config.resources
    os.nice(resources.nice)
    disable_progress_bar()
    torch.set_num_threads(resources.threads)
    folder = locate(config.model)
    base = identify(folder)
    engine = open_store(config.state)
    with only_trainer(config.state):
        prepare_versions(engine, config, base)
        metrics = TrainerMetrics(config.tensorboard or config.state.folder / "tensorboard")
        port = metrics.serve(config.metrics)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        trunk = Trunk.open(
            folder,
            config.lora,
            verdict_tokens(config.verdict, tokenizer),
            device=resources.device,
            dtype=resources.dtype,
        )
        special = set(tokenizer.all_special_ids)
        loop = Loop(
            config,
            engine,
            trunk,
            base,
            metrics,
            vocabulary=[i for i in range(len(tokenizer)) if i not in special],
            end=end_tokens(folder, trunk, tokenizer),
        )
        metrics.say(f"training on {trunk.device}, metrics on {port}")
        loop.run()


@contextmanager
def only_trainer(state: State) -> Iterator[None]:
    """Hold the lock that lets one trainer write versions."""
    with (state.folder / "trainer.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"state.folder: another trainer works on {state.folder}; stop it first"
            ) from None
        yield


def prepare_versions(
    engine: Engine, config: TrainerConfig, base: artifacts.BaseModelIdentity
) -> None:
    """Write version 0's folder where it is missing, and remove what a killed trainer left behind."""
    artifacts.claim_base(config.state.versions, DEFAULT_POLICY, base, time())
    with reading(engine) as connection:
        published = [v.version for v in versions.list_versions(connection, DEFAULT_POLICY)]
    artifacts.remove_unpublished(config.state.versions, DEFAULT_POLICY, published)


def end_tokens(folder: Path, trunk: Trunk, tokenizer: Any) -> list[int]:
    """Return every token that ends a reply, by tokenizer, model and generation settings."""
    sources = [tokenizer.eos_token_id, trunk.causal.config.eos_token_id]
    if (folder / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(str(folder)).eos_token_id)
    return sorted(
        {i for ids in sources for i in (ids if isinstance(ids, list) else [ids]) if i is not None}
    )


def stop(_signal: int, _frame: object) -> NoReturn:
    """Drop what is in progress."""
    raise Stopped


def main(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
) -> None:
    """Learn from thumbs and publish policy versions."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        train(load(TrainerConfig, config))
    except Stopped:
        print("stopped", flush=True)
    except (ThumbloopError, OperationalError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    typer.run(main)
