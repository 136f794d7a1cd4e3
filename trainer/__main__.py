"""python -m trainer: parse settings, learn until told to stop. Wiring only."""

import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from sqlalchemy.exc import OperationalError

from thumbloop import logs
from thumbloop.base_model import locate
from thumbloop.config import TrainerConfig, load
from thumbloop.errors import ThumbloopError
from trainer.launching import launch


class Stopped(BaseException):
    """SIGTERM or SIGINT: a round in progress is dropped, as nothing of it is written yet."""


def stop(_signal: int, _frame: object) -> NoReturn:
    """Drop what is in progress."""
    raise Stopped


def say_error(words: str, rank: int | None) -> None:
    """Say in one line why this process ends; of several each does, as one may fail alone."""
    process = "" if rank is None else f"process {rank}: "
    logs.say_error(f"{process}{' '.join(words.split())}")


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
        logs.configure(settings.logging)
        folder = locate(settings.model)
        from trainer import training  # seconds of imports: only where the settings are sound

        count = training.process_count(settings.resources)
        if rank is None and count > 1:
            code = launch(count)
        else:
            training.train(settings, folder, rank)
    except Stopped:
        if rank is None:
            print("stopped", flush=True)
    except (ThumbloopError, OperationalError, OSError) as error:
        say_error(str(error), rank)
        code = 2
    raise SystemExit(code)


if __name__ == "__main__":
    typer.run(main)
