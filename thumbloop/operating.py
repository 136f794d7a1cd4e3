"""Commands of operators: which versions there are, which one answers, and copies of them for others."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table

from thumbloop.client import DEFAULT_ADDRESS
from thumbloop.connecting import Address, Authorities, Certificate, Key, Token, WithTls, server
from thumbloop.copying import copy_version
from thumbloop.opening import Config, StateFolder, Url, state_at
from thumbloop.tracing import state_in_words
from thumbloop.types import DEFAULT_POLICY
from thumbloop.v1 import admin_pb2

app = typer.Typer()
listing = typer.Typer()
app.add_typer(listing, name="versions")

COLUMNS = ("version", "state", "parent", "thumbs", "published (UTC)", "reason")

Number = Annotated[int, typer.Argument(min=0, help="The version's number.")]
Expected = Annotated[
    int | None,
    typer.Option(min=0, help="Only if this version is current; absent: whichever is."),
]
Reason = Annotated[str, typer.Option(help="Why, for the event log.")]


@listing.callback(invoke_without_command=True)
def versions(
    context: typer.Context,
    *,
    address: Address = DEFAULT_ADDRESS,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """List policy versions, newest first; or copy one for others."""
    if context.invoked_subcommand is not None:
        return
    with server(address, token, ca, cert, key, tls) as client:
        listed = client.versions()
    table = Table(*COLUMNS)
    for version in listed.policy_versions:
        table.add_row(*row_of(version))
    Console().print(table)


def row_of(version: admin_pb2.PolicyVersion) -> tuple[str, ...]:
    """Return what a list of versions says of one, by column."""
    return (
        str(version.policy_version),
        state_in_words(
            version.state,
            is_tainted=version.is_tainted,
            is_deleted=version.HasField("collected_at"),
        ),
        str(version.parent_version) if version.HasField("parent_version") else "",
        str(version.feedback_count),
        time_in_words(version.published_at),
        version.reason,
    )


def time_in_words(at: Timestamp) -> str:
    """Return a moment, UTC, to the second."""
    return at.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")


@listing.command("export")
def export_version(
    version: Number,
    folder: Annotated[Path, typer.Argument(help="Where to; a folder that is not there yet.")],
    *,
    base_model: Annotated[
        str,
        typer.Option(
            help="What others call the base model, for instance on the hub; for the card."
        ),
    ] = "",
    config: Config = None,
    state: StateFolder = None,
    url: Url = None,
) -> None:
    """Copy a version's adapters from the state folder, as PEFT and vLLM load them, with a model card."""
    with state_at(config, state, url) as opened:
        copied = copy_version(
            opened.store, opened.versions, DEFAULT_POLICY, version, folder, base_model
        )
    if copied.is_tainted:
        print(
            f"warning: version {version}, or one it grew from, learned from data that was erased since",
            file=sys.stderr,
        )
    print(f"version {version} is in {folder}")


@app.command()
def promote(
    version: Number,
    *,
    expected: Expected = None,
    reason: Reason = "",
    address: Address = DEFAULT_ADDRESS,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """Make a version current, from the next request on."""
    with server(address, token, ca, cert, key, tls) as client:
        before = client.versions().current_version if expected is None else expected
        moved = client.promote(version, expected_current=before, reason=reason)
        print(f"version {moved.policy_version} is current, version {before} is retired")


@app.command()
def rollback(
    version: Annotated[
        int | None,
        typer.Argument(
            min=0,
            help="Where to; absent: the nearest ancestor that is still good. The current version: away"
            " from the canary.",
        ),
    ] = None,
    *,
    expected: Expected = None,
    reason: Reason = "",
    address: Address = DEFAULT_ADDRESS,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """Take the current version back, from the next request on; the trainer goes on from the other."""
    with server(address, token, ca, cert, key, tls) as client:
        before = client.versions().current_version if expected is None else expected
        moved = client.roll_back(version, expected_current=before, reason=reason)
        if moved.policy_version == before:
            print(f"version {before} answers everybody, the canary is rolled back")
        else:
            print(f"version {moved.policy_version} is current, version {before} is rolled back")
