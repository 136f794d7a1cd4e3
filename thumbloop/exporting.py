"""The command that takes data out: what may be learned from, as files that other tools read."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import Engine

from thumbloop.errors import StoreUnavailable
from thumbloop.exchange.files import check_name, replacing, write
from thumbloop.exchange.shapes import Prompts, Shape, records
from thumbloop.opening import Config, StateFolder, Url, state_at
from thumbloop.store import erasure, reading
from thumbloop.store.exports import Selection
from thumbloop.types import DEFAULT_POLICY

app = typer.Typer()

_FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
_MOST_TRIES = 5

Since = Annotated[
    datetime | None,
    typer.Option(
        formats=_FORMATS, help="Only what was said from then on, UTC; of rollouts: given."
    ),
]
Until = Annotated[
    datetime | None, typer.Option(formats=_FORMATS, help="Only what came before, UTC.")
]


@app.command("export")
def export_data(
    shape: Annotated[
        Shape,
        typer.Argument(
            help="kto: prompt, completion, label from thumbs. dpo: prompt, chosen, rejected from"
            " preferences. rollouts: replies with all candidates."
        ),
    ],
    file: Annotated[
        Path, typer.Argument(help="Where to: a name that ends with .jsonl or .parquet.")
    ],
    *,
    since: Since = None,
    until: Until = None,
    policy_version: Annotated[
        int | None, typer.Option(min=0, help="Only replies of this version.")
    ] = None,
    prompts: Annotated[
        Prompts | None,
        typer.Option(help="Only replies to texts, or to conversations; a data set is of one kind."),
    ] = None,
    origin: Annotated[
        bool,
        typer.Option("--origin", help="Also where each comes from, when, and whose it is, by id."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file of this name.")] = False,
    config: Config = None,
    state: StateFolder = None,
    url: Url = None,
) -> None:
    """Write thumbs, preferences or rollouts from the store into a file; what may not be learned from stays."""
    which = Selection(_unix(since), _unix(until), policy_version)
    with state_at(config, state, url) as opened:
        check_name(file)
        count = export(opened.store, file, shape, which, prompts, has_origin=origin, force=force)
    print(f"{count} records in {file}")


def export(
    store: Engine,
    file: Path,
    shape: Shape,
    which: Selection,
    prompts: Prompts | None,
    *,
    has_origin: bool,
    force: bool,
) -> int:
    """Write a file that holds nothing of whoever was forgotten before it is there; return how many records it has.

    Raises BadDataFile, StoreUnavailable.
    """
    with replacing(file, force=force) as temporary:
        for _ in range(_MOST_TRIES):
            before = _latest_erasure(store)
            found = records(
                store, DEFAULT_POLICY, shape, which, prompts=prompts, has_origin=has_origin
            )
            count = write(temporary, file, shape, found)
            if _latest_erasure(store) == before:
                return count
        raise StoreUnavailable("users are being forgotten all the time; try again")


def _latest_erasure(store: Engine) -> int:
    with reading(store) as connection:
        return erasure.latest(connection)


def _unix(at: datetime | None) -> float | None:
    """Return unix seconds; a time without a zone is UTC."""
    if at is None:
        return None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
