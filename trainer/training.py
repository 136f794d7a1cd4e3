"""One trainer's life: build everything, then rounds; of several processes the first does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from thumbloop.config import State, TrainerConfig
from thumbloop.config.shared import Logging
from thumbloop.config.trainer import Resources
from thumbloop.errors import SettingsError
from thumbloop.locks import try_lock
from thumbloop.logs import Progress
from thumbloop.store import only_trainer, open_store
from trainer.assembly import assemble, follow
from trainer.metrics import TrainerMetrics
from trainer.parallel import ALONE, Team


def train(config: TrainerConfig, folder: Path, rank: int | None) -> None:
    """Learn until told to stop, from the base model in `folder`; `rank` is None where there is one process.

    Raises SettingsError, StoreIncompatible, StoreUnavailable, BadPolicyVersion.
    """
    try:
        _train(config, folder, rank)
    except torch.OutOfMemoryError as error:
        raise SettingsError(
            f"too little GPU memory, a smaller resources.micro_batch_tokens needs less: {error}"
        ) from None


def _train(config: TrainerConfig, folder: Path, rank: int | None) -> None:
    resources = config.resources
    os.nice(resources.nice)
    disable_progress_bar()
    workers = ALONE if rank is None else Team(cpu=not _is_on_gpus(resources))
    torch.set_num_threads(resources.threads)  # after accelerate, which sets its own
    if workers.rank > 0:
        follow(config, folder, workers)
        return
    engine = open_store(config.state)
    with only_trainer_of(config.state), only_trainer(engine):
        curves = config.tensorboard or config.state.folder / "tensorboard"
        metrics = TrainerMetrics(curves, _console(config.logging))
        port = metrics.serve(config.metrics)
        loop, trunk, *_ = assemble(config, folder, engine, metrics, workers)
        of_processes = f" in {workers.count} processes" if workers.count > 1 else ""
        padded = "" if trunk.is_packed else ", batches padded"
        metrics.say(f"training on {trunk.device}{of_processes}{padded}, metrics on {port}")
        loop.run()


def _console(settings: Logging) -> Console:
    """Return where progress is told: in the terminal, or among other lines of JSON."""
    file = cast(IO[str], Progress("trainer")) if settings.format == "json" else None
    return Console(file=file, highlight=False, soft_wrap=True)


def process_count(resources: Resources) -> int:
    """Return how many processes are to compute together. Raises SettingsError: there are not so many GPUs."""
    if not _is_on_gpus(resources):
        return resources.processes or 1
    found = torch.cuda.device_count() if resources.device in ("auto", "cuda") else 1
    if (resources.processes or 1) > found:
        raise SettingsError(
            f"resources.processes: {resources.processes} processes need a GPU each;"
            f" of resources.device {resources.device} there are {found}"
        )
    return resources.processes or found


def _is_on_gpus(resources: Resources) -> bool:
    return resources.device != "cpu" and torch.cuda.is_available()


@contextmanager
def only_trainer_of(state: State) -> Iterator[None]:
    """Hold the lock that lets one trainer write into a state folder."""
    with try_lock(state.folder / "trainer.lock") as taken:
        if not taken:
            raise SettingsError(
                f"state.folder: another trainer works on {state.folder}; stop it first"
            )
        yield
