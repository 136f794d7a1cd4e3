"""python -m trainer: parse settings, build the loop, learn until told to stop. Wiring only."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from sqlalchemy.exc import OperationalError
from transformers.utils.logging import disable_progress_bar

from thumbloop.base_model import locate
from thumbloop.config import State, TrainerConfig, load
from thumbloop.config.trainer import Resources
from thumbloop.errors import SettingsError, ThumbloopError
from thumbloop.locks import try_lock
from thumbloop.store import only_trainer, open_store
from trainer.assembly import assemble, follow
from trainer.launching import launch
from trainer.metrics import TrainerMetrics
from trainer.parallel import ALONE, Team


class Stopped(BaseException):
    """SIGTERM or SIGINT: a round in progress is dropped, as nothing of it is written yet."""


def train(config: TrainerConfig, rank: int | None) -> None:
    """Build everything, then run rounds; of several processes the first does."""
    resources = config.resources
    os.nice(resources.nice)
    disable_progress_bar()
    workers = ALONE if rank is None else Team(cpu=not _is_on_gpus(resources))
    torch.set_num_threads(resources.threads)  # after accelerate, which sets its own
    folder = locate(config.model)
    if workers.rank > 0:
        follow(config, folder, workers)
        return
    engine = open_store(config.state)
    with only_trainer_of(config.state), only_trainer(engine):
        metrics = TrainerMetrics(config.tensorboard or config.state.folder / "tensorboard")
        port = metrics.serve(config.metrics)
        loop, trunk, *_ = assemble(config, folder, engine, metrics, workers)
        of_processes = f" in {workers.count} processes" if workers.count > 1 else ""
        padded = "" if trunk.is_packed else ", batches padded"
        metrics.say(f"training on {trunk.device}{of_processes}{padded}, metrics on {port}")
        loop.run()


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


def stop(_signal: int, _frame: object) -> NoReturn:
    """Drop what is in progress."""
    raise Stopped


def say_error(words: str, rank: int | None) -> None:
    """Say in one line why this process ends; of several each does, as one may fail alone."""
    process = "" if rank is None else f"process {rank}: "
    print(f"error: {process}{' '.join(words.split())}", file=sys.stderr)


def main(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    rank: Annotated[int | None, typer.Option(hidden=True, help="One of several processes.")] = None,
) -> None:
    """Learn from thumbs and publish policy versions."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    code = 0
    try:
        settings = load(TrainerConfig, config)
        count = process_count(settings.resources)
        if rank is None and count > 1:
            code = launch(count)
        else:
            train(settings, rank)
    except Stopped:
        if rank is None:
            print("stopped", flush=True)
    except torch.OutOfMemoryError as error:
        say_error(
            f"too little GPU memory, a smaller resources.micro_batch_tokens needs less: {error}",
            rank,
        )
        code = 2
    except (ThumbloopError, OperationalError, OSError) as error:
        say_error(str(error), rank)
        code = 2
    raise SystemExit(code)


if __name__ == "__main__":
    typer.run(main)
