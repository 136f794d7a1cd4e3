"""python -m experiments.busy JOB: our update again and again, as the trainer works, until it is stopped.

Prints `ready`, then a line for each optimizer step.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from experiments.frozen import Job
from experiments.update import Updates
from thumbloop.config.trainer import Resources
from trainer.epochs import accumulate


def saying(function: Callable[..., Any], word: str) -> Callable[..., Any]:
    """Return a function that says a word after each call."""

    def said(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        print(word, flush=True)
        return result

    return said


def main(
    job: Annotated[Path, typer.Argument(help="What `python -m experiments.frozen` wrote.")],
    max_share: Annotated[float, typer.Option(help="The trainer's resources.max_share.")] = 1.0,
) -> None:
    """Update without end."""
    disable_progress_bar()
    os.nice(Resources().nice)
    frozen = Job.read(job)
    torch.set_num_threads(frozen.threads)
    updates = Updates(frozen, max_share)
    print("ready", flush=True)
    with patch("trainer.epochs.accumulate", saying(accumulate, "step")):
        while True:
            updates.run()


if __name__ == "__main__":
    typer.run(main)
