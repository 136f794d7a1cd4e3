"""python -m trainer: parse settings, build the loop, learn until told to stop. Wiring only."""

import fcntl
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
from thumbloop.errors import SettingsError, ThumbloopError
from thumbloop.store import only_trainer, open_store
from trainer.assembly import assemble
from trainer.metrics import TrainerMetrics


class Stopped(BaseException):
    """SIGTERM or SIGINT: a round in progress is dropped, as nothing of it is written yet."""


def train(config: TrainerConfig) -> None:
    """Build everything, then run rounds."""
    resources = config.resources
    os.nice(resources.nice)
    disable_progress_bar()
    torch.set_num_threads(resources.threads)
    folder = locate(config.model)
    engine = open_store(config.state)
    with only_trainer_of(config.state), only_trainer(engine):
        metrics = TrainerMetrics(config.tensorboard or config.state.folder / "tensorboard")
        port = metrics.serve(config.metrics)
        loop, trunk, *_ = assemble(config, folder, engine, metrics)
        metrics.say(f"training on {trunk.device}, metrics on {port}")
        loop.run()


@contextmanager
def only_trainer_of(state: State) -> Iterator[None]:
    """Hold the lock that lets one trainer write into a state folder."""
    with (state.folder / "trainer.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"state.folder: another trainer works on {state.folder}; stop it first"
            ) from None
        yield


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
