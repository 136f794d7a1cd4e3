"""`thumbloop doctor`: a line for each check, and an exit code."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from thumbloop.doctor.examination import examine
from thumbloop.doctor.findings import Finding, Level

app = typer.Typer()


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option(help="The server's settings, YAML.")] = None,
    trainer_config: Annotated[
        Path | None, typer.Option(help="The trainer's settings, YAML; absent: it is left out.")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object for each check.")] = False,
) -> None:
    """Look the installation over, and say what to mend; exits with 1 where something is wrong."""
    is_wrong = False
    for finding in examine(config, trainer_config):
        is_wrong |= finding.level is Level.WRONG
        print(json.dumps(asdict(finding)) if as_json else _line(finding), flush=True)
    raise SystemExit(int(is_wrong))


def _line(finding: Finding) -> str:
    advice = f" -> {finding.advice}" if finding.advice else ""
    return f"{finding.level.value:<8}{finding.check}: {finding.found}{advice}"
