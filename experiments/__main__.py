"""python -m experiments NAME: one command for each claim about learning."""

import typer

from experiments import (
    attack,
    candidates,
    controls,
    front,
    gate,
    hack,
    kills,
    learning,
    minibatches,
    propensity,
    stages,
    trials,
    truncation,
)

COMMANDS = (
    learning,
    propensity,
    candidates,
    truncation,
    minibatches,
    stages,
    controls,
    gate,
    hack,
    front,
    kills,
    trials,
    attack,
)
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for module in COMMANDS:
    app.command(module.__name__.rpartition(".")[2])(module.main)


@app.callback()
def _main() -> None:
    """Claims about learning, each a command; JSON and pictures go to runs/experiments."""


if __name__ == "__main__":
    app()
