"""Commands of operators: where a version comes from, which versions a user is in, and forgetting that user."""

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from thumbloop.client import DEFAULT_ADDRESS
from thumbloop.connecting import Address, Authorities, Certificate, Key, Token, WithTls, server
from thumbloop.v1 import admin_pb2

app = typer.Typer()

_STATE = "POLICY_VERSION_STATE_"

Subject = Annotated[
    str | None,
    typer.Option(help="Subject of the token that names the user; absent: that of this token."),
]


def state_in_words(
    state: "admin_pb2.PolicyVersionState.ValueType", *, is_tainted: bool, is_deleted: bool = False
) -> str:
    """Return a version's state, whether its folder was deleted, and whether it is tainted."""
    name = admin_pb2.PolicyVersionState.Name(state).removeprefix(_STATE).lower()
    found = (name, "deleted" if is_deleted else "", "tainted" if is_tainted else "")
    return ", ".join(filter(None, found))


@app.command()
def lineage(
    version: Annotated[
        int | None, typer.Argument(min=0, help="The version's number; absent: the current one.")
    ] = None,
    *,
    user: Annotated[
        str | None, typer.Option(help="Instead: the user whose influence is looked for.")
    ] = None,
    subject: Subject = None,
    address: Address = DEFAULT_ADDRESS,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """Show what a version and its ancestors learned from, or which versions learned from a user."""
    if version is not None and user is not None:
        raise typer.BadParameter("a version or a --user, not both")
    if subject is not None and user is None:
        raise typer.BadParameter("--subject needs a --user")
    with server(address, token, ca, cert, key, tls) as client:
        if user is None:
            _show_line(client.version(version).lineage)
        else:
            _show_influence(client.trace(user, subject=subject))


def _show_line(lineage: admin_pb2.Lineage) -> None:
    table = Table("version", "state", "new", "feedback ids", "replayed", "replies")
    for step in lineage.line:
        table.add_row(
            str(step.policy_version),
            state_in_words(step.state, is_tainted=step.is_tainted),
            str(step.feedback_count),
            _range(step.first_feedback_id, step.last_feedback_id),
            str(step.replayed_count),
            str(step.reply_count),
        )
    console = Console()
    console.print(table)
    ids = _range(lineage.first_feedback_id, lineage.last_feedback_id)
    among = f", thumbs with ids in {ids} among them" if ids else ""
    console.print(f"learned from {lineage.feedback_count} thumbs and preferences{among}")
    if lineage.HasField("settings_json"):
        console.print("settings of its round:")
        console.print_json(lineage.settings_json)


def _range(first: int, last: int) -> str:
    return f"{first} to {last}" if first else ""


def _show_influence(found: admin_pb2.GetUserLineageResponse) -> None:
    if not found.learned:
        print("no version learned from this user")
        return
    table = Table("version", "thumbs", "preferences", "replies")
    for used in found.learned:
        counts = (used.policy_version, used.thumbs, used.preferences, used.replies)
        table.add_row(*map(str, counts))
    Console().print(table)
    print(f"grown from them: {_listed(found.descendants) or 'none'}")


@app.command()
def forget(
    user: Annotated[str, typer.Argument(help="The user; empty: whoever the subject itself is.")],
    *,
    subject: Subject = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    address: Address = DEFAULT_ADDRESS,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """Erase a user's prompts, replies and feedback for good, and name the versions that learned from them."""
    if not yes:
        typer.confirm("erase all that is stored of this user?", abort=True)
    with server(address, token, ca, cert, key, tls) as client:
        done = client.forget(user, subject=subject)
    print(
        f"erased {done.interactions_erased} replies and {done.feedback_erased} thumbs and preferences"
    )
    print(f"tainted versions: {_listed(done.tainted_policy_versions) or 'none'}")


def _listed(versions: Iterable[int]) -> str:
    return ", ".join(map(str, versions))
