"""Options that the commands share."""

from pathlib import Path
from typing import Annotated

import typer

FOLDER = Path("runs/experiments")

Seeds = Annotated[int, typer.Option(min=1, help="Runs, with seeds from 0.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds of learning in each run.")]
Thumbs = Annotated[int, typer.Option(min=1, help="Thumbs given in each run, at least.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time, one core each.")]
Folder = Annotated[Path, typer.Option(help="Where JSON and picture go.")]
