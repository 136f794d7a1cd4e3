"""python -m experiments NAME: one command for each claim about learning."""

import typer

from experiments import (
    candidates,
    controls,
    front,
    gate,
    hack,
    off_policy,
    propensity,
    reward,
    stages,
    thumbs,
    truncation,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for module in (
    thumbs,
    reward,
    propensity,
    candidates,
    truncation,
    stages,
    controls,
    gate,
    hack,
    off_policy,
    front,
):
    app.command(module.__name__.rpartition(".")[2])(module.main)


@app.callback()
def _main() -> None:
    """Claims about learning, each a command; JSON and pictures go to runs/experiments."""


if __name__ == "__main__":
    app()
