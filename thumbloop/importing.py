"""The command that brings thumbs in which people gave elsewhere, through the server."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from thumbloop.client import DEFAULT_ADDRESS, Client
from thumbloop.connecting import Address, Authorities, Certificate, Key, Token, WithTls, server
from thumbloop.errors import BadDataFile
from thumbloop.exchange import incoming, langfuse
from thumbloop.exchange.files import Line, read
from thumbloop.exchange.incoming import Item
from thumbloop.exchange.langfuse import USER_FEEDBACK, Scores
from thumbloop.exchange.shapes import Prompts
from thumbloop.tracing import Subject
from thumbloop.v1 import admin_pb2

app = typer.Typer()

_MOST_ITEMS = 64
_MOST_BYTES = 1 << 20
"""What is sent at once: far below the largest message that a server takes."""
_LARGEST = 3 << 20
"""One item that is sent alone; servers take messages of 4 MiB."""
_OUTCOMES = {
    admin_pb2.IMPORT_OUTCOME_IMPORTED: "imported",
    admin_pb2.IMPORT_OUTCOME_DUPLICATE: "duplicate",
}


@app.command("import")
def import_data(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSON Lines or Parquet with prompt, completion and label, or prompt, chosen and rejected;"
            " or Langfuse's scores, with --traces."
        ),
    ],
    *,
    traces: Annotated[
        Path | None,
        typer.Option(help="Langfuse's traces or observations, which the scores are about."),
    ] = None,
    score: Annotated[str, typer.Option(help="Name of the scores that are thumbs.")] = USER_FEEDBACK,
    up_from: Annotated[
        float | None,
        typer.Option(
            help="Scores from this value on are thumbs up; absent: 1 is, 0 and -1 are not."
        ),
    ] = None,
    plain: Annotated[
        Prompts | None,
        typer.Option(
            help="What a prompt that is a mere string means: a text to continue, or a user's only turn."
            " Absent: text, of traces chat."
        ),
    ] = None,
    user: Annotated[str, typer.Option(help="Who said what names nobody.")] = "",
    subject: Subject = None,
    address: Address = DEFAULT_ADDRESS,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """Bring thumbs and preferences from before in; done again, what is there stays as it is."""
    with server(address, token, ca, cert, key, tls) as client:
        if traces is None:
            found = _plain_items(file, plain or Prompts.TEXT, user)
        else:
            found = langfuse.items_of(
                read(file),
                file.name,
                read(traces),
                Scores(score, up_from),
                plain or Prompts.CHAT,
                user,
            )
        done = bring_in(client, found, subject)
    if traces is not None and not done:
        print(f"no score is called {score}; --score says which ones are thumbs", file=sys.stderr)
    print(
        f"imported {done['imported']}, there already {done['duplicate']}, refused {done['refused']}"
    )
    if done["refused"]:
        raise SystemExit(1)


def _plain_items(file: Path, plain: Prompts, user: str) -> Iterator[Item]:
    """Yield what a file says. Raises BadDataFile: it holds scores, which say nothing without their traces."""
    lines = read(file)
    first = next(lines, None)
    if first is None:
        return iter(())
    if first.record is not None and langfuse.is_score(first.record):
        raise BadDataFile(f"{file} holds scores; name what they are about with --traces")
    together: Iterator[Line] = chain([first], lines)
    return incoming.items_of(together, file.name, plain, user)


def bring_in(client: Client, items: Iterable[Item], subject: str | None) -> Counter[str]:
    """Send items, some at a time; say of each that is refused where it stands and why, and count all."""
    done: Counter[str] = Counter()
    for batch in _batches(items):
        sent = [item.feedback for item in batch if item.feedback is not None]
        results = iter(client.import_feedback(sent, subject=subject).results if sent else ())
        for item in batch:
            outcome, reason = "refused", item.problem
            if item.feedback is not None:
                result = next(results)
                outcome, reason = _OUTCOMES.get(result.outcome, "refused"), result.reason
            done[outcome] += 1
            if outcome == "refused":
                print(f"{item.place}: {reason}", file=sys.stderr)
    return done


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield items, so many at a time as are sent at once."""
    batch: list[Item] = []
    size = 0
    for item in map(_of_a_size, items):
        item_bytes = 0 if item.feedback is None else item.feedback.ByteSize()
        if batch and (len(batch) == _MOST_ITEMS or size + item_bytes > _MOST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item_bytes
    if batch:
        yield batch


def _of_a_size(item: Item) -> Item:
    """Return an item, as one that is refused where no server would take it."""
    if item.feedback is not None and item.feedback.ByteSize() > _LARGEST:
        return Item(item.place, None, f"is longer than {_LARGEST >> 20} MiB")
    return item
