"""python -m demo: a policy gets better from thumbs while it serves, on this machine, in minutes."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from demo.loop import base_model, run_loop
from demo.plot import plot_learning
from demo.preferences import PreferenceFailed, load_preference
from demo.pretraining import Progress
from demo.report import summary
from demo.settings import Options
from demo.table import versions_table
from thumbloop.errors import ThumbloopError
from thumbloop.processes import ProcessFailed

_MINUTES, _MINUTES_A_ROUND = 8.0, 4 / 3

console = Console()
if not console.is_terminal:
    console = Console(width=110)  # a log file has no width of its own


def main(
    preference: Annotated[
        str, typer.Option(help="praise, brevity, courtesy or module:function.")
    ] = "praise",
    seed: Annotated[int, typer.Option(min=0, help="Seed of users, sampling and learning.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Versions to publish before it ends.")] = 6,
    shuffle_thumbs: Annotated[bool, typer.Option(help="The control: nothing to learn.")] = False,
    model: Annotated[str | None, typer.Option(help="Folder or hub id; absent: our own.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the run's files go.")] = Path("runs/demo"),
    max_minutes: Annotated[
        float | None,
        typer.Option(help="Ends it even with fewer versions; absent: 8, more for many rounds."),
    ] = None,
) -> None:
    """Show the loop: serve, rate, learn, swap; then report."""
    minutes = max(_MINUTES, rounds * _MINUTES_A_ROUND) if max_minutes is None else max_minutes
    options = Options(preference, seed, rounds, shuffle_thumbs, model, folder, minutes)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # the same way out as Ctrl-C
    try:
        load_preference(preference)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        _run(options)
    except (ThumbloopError, ProcessFailed, PreferenceFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; no process is left behind", file=sys.stderr)
        raise SystemExit(130) from None


def _run(options: Options) -> None:
    with console.status("building the base model") as status:

        def on_progress(progress: Progress) -> None:
            status.update(f"building the base model: step {progress.step} of {progress.steps}")

        trunk = base_model(options, on_progress)
    with Live(console=console, auto_refresh=False) as live:

        def show(rows: list[dict[str, Any]], caption: str) -> None:
            live.update(versions_table(rows, caption=caption), refresh=console.is_terminal)

        report = asyncio.run(run_loop(options, trunk, show))
        show(report["versions"], "done")
    (options.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    plot_learning(report, options.folder / "learning.png")
    if report["versions"][-1]["policy_version"] < options.rounds and not options.shuffled:
        minutes = f"{options.max_minutes:g}"
        console.print(
            f"Time was up after {minutes} minutes; MINUTES= gives it more.", soft_wrap=True
        )
    console.print(summary(report, options.folder), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
