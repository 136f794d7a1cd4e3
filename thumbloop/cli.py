"""The `thumbloop` command: ask, chat, rate, see versions, make tokens."""

import hashlib
import json
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from thumbloop.client import DEFAULT_ADDRESS, Client, GenerateOptions, ReplyStream, Tls
from thumbloop.errors import SettingsError, ThumbloopError
from thumbloop.types import Message, Role, Scope
from thumbloop.v1 import admin_pb2, policy_pb2

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

_KEYS = {"+": True, "u": True, "-": False, "d": False}
_TOKEN_BYTES = 32
_STATE = "POLICY_VERSION_STATE_"

Address = Annotated[str, typer.Option(envvar="THUMBLOOP_ADDRESS", help="Where the server listens.")]
Token = Annotated[str, typer.Option(envvar="THUMBLOOP_TOKEN", help="Bearer token.")]
Authorities = Annotated[
    Path | None,
    typer.Option(
        "--ca", envvar="THUMBLOOP_CA", help="PEM file of authorities to trust; turns TLS on."
    ),
]
Certificate = Annotated[
    Path | None,
    typer.Option(
        "--cert", envvar="THUMBLOOP_CERT", help="PEM file of a certificate to show; needs --key."
    ),
]
Key = Annotated[
    Path | None,
    typer.Option("--key", envvar="THUMBLOOP_KEY", help="PEM file of its private key."),
]
WithTls = Annotated[
    bool,
    typer.Option(
        "--tls",
        envvar="THUMBLOOP_TLS",
        help="TLS; without --ca the public authorities are trusted.",
    ),
]
User = Annotated[str, typer.Option(help="The user who asks or rates.")]
Strategy = Annotated[
    str | None, typer.Option(help="How the reply is chosen; absent: the server's.")
]
Candidates = Annotated[int | None, typer.Option("--candidates", "-n", help="Candidates sampled.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of the reply.")]


@contextmanager
def _server(
    address: str, token: str, ca: Path | None, cert: Path | None, key: Path | None, tls: bool
) -> Iterator[Client]:
    """Connect; what goes wrong is said in one line."""
    try:
        with Client(address, token=token, tls=tls_of(ca, cert, key, tls)) as client:
            yield client
    except ThumbloopError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def tls_of(ca: Path | None, cert: Path | None, key: Path | None, tls: bool) -> Tls | None:
    """Return how to reach a server with TLS, which each of these turns on. Raises SettingsError."""
    if (cert is None) != (key is None):
        raise SettingsError("--cert and --key need each other")
    if not (tls or ca or cert):
        return None
    return Tls(_pem("--ca", ca), _pem("--cert", cert), _pem("--key", key))


def _pem(option: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{option}: {path} cannot be read: {error.strerror}") from None


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    *,
    text: Annotated[bool, typer.Option("--text", help="Continue the prompt as a text.")] = False,
    user: User = "",
    strategy: Strategy = None,
    candidates: Candidates = None,
    max_tokens: MaxTokens = None,
    address: Address = DEFAULT_ADDRESS,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """Answer one prompt; the reply's text goes to stdout, what to rate it by to stderr."""
    options = GenerateOptions(strategy=strategy, num_candidates=candidates, max_tokens=max_tokens)
    with _server(address, token, ca, cert, key, tls) as client:
        reply = _say(client.stream(prompt, is_text=text, user_id=user, options=options))
        if reply is not None:
            print(_facts(reply), file=sys.stderr)


@app.command()
def chat(
    *,
    user: User = "",
    strategy: Strategy = None,
    candidates: Candidates = None,
    max_tokens: MaxTokens = None,
    address: Address = DEFAULT_ADDRESS,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """Talk; after each reply + or u is a thumb up, - or d one down, any other key none."""
    options = GenerateOptions(strategy=strategy, num_candidates=candidates, max_tokens=max_tokens)
    if not sys.stdin.isatty():
        print("error: chat needs a terminal; see thumbloop generate", file=sys.stderr)
        raise SystemExit(2)
    with _server(address, token, ca, cert, key, tls) as client:
        converse(client, options, user, ask=_ask, key=typer.getchar)


def converse(
    client: Client,
    options: GenerateOptions,
    user: str,
    *,
    ask: Callable[[], str | None],
    key: Callable[[], str],
) -> None:
    """Ask and answer until there is nothing more to ask."""
    turns: list[Message] = []
    while question := ask():
        turns.append(Message(Role.USER, question))
        reply = _say(client.stream(turns, user_id=user, options=options))
        if reply is None:
            return
        turns.append(Message(Role.ASSISTANT, reply.text))
        print(f"version {reply.policy_version}; + or - to rate, any other key to go on")
        thumb = _KEYS.get(key())
        if thumb is not None:
            client.rate(reply.response_id, up=thumb, user_id=user)
            print("thumb up" if thumb else "thumb down")


def _say(stream: ReplyStream) -> policy_pb2.GenerateResponse | None:
    """Print a reply as it comes; return what there is to know of it."""
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    return stream.reply


def _ask() -> str | None:
    """Return what is typed; None when there is nothing more."""
    try:
        return input("> ").strip() or None
    except EOFError:
        return None


@app.command()
def rate(
    response_id: Annotated[str, typer.Argument(help="What the reply is called.")],
    thumb: Annotated[str, typer.Argument(help="up or down")],
    *,
    comment: Annotated[str, typer.Option(help="Free words.")] = "",
    user: User = "",
    address: Address = DEFAULT_ADDRESS,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """Give a reply a thumb."""
    if thumb not in ("up", "down"):
        raise typer.BadParameter("has to be up or down", param_hint="thumb")
    with _server(address, token, ca, cert, key, tls) as client:
        stored = client.rate(response_id, up=thumb == "up", user_id=user, comment=comment)
        print(f"feedback {stored.feedback_id} for version {stored.policy_version}")


@app.command()
def versions(
    *,
    address: Address = DEFAULT_ADDRESS,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """List policy versions, newest first."""
    with _server(address, token, ca, cert, key, tls) as client:
        listed = client.versions()
    table = Table("version", "state", "parent", "thumbs", "published (UTC)", "reason")
    for version in listed.policy_versions:
        state = admin_pb2.PolicyVersionState.Name(version.state).removeprefix(_STATE).lower()
        table.add_row(
            str(version.policy_version),
            state,
            str(version.parent_version) if version.HasField("parent_version") else "",
            str(version.feedback_count),
            version.published_at.ToDatetime().strftime("%Y-%m-%d %H:%M:%S"),
            version.reason,
        )
    Console().print(table)


@app.command()
def token(
    subject: Annotated[str, typer.Argument(help="Who will use it.")],
    scopes: Annotated[
        list[Scope], typer.Option("--scope", help="What it is for; may be given again.")
    ],
) -> None:
    """Make a bearer token: it goes to stdout, the server's settings for it to stderr."""
    secret = secrets.token_urlsafe(_TOKEN_BYTES)
    names = ", ".join(scope.value for scope in scopes)
    print(secret)
    print(
        "access:\n  tokens:\n"
        f"    {json.dumps(subject, ensure_ascii=False)}:\n"
        f"      sha256: {hashlib.sha256(secret.encode()).hexdigest()}\n"
        f"      scopes: [{names}]",
        file=sys.stderr,
    )


def _facts(reply: policy_pb2.GenerateResponse) -> str:
    reward = f", reward {reply.reward:.2f}" if reply.HasField("reward") else ""
    return (
        f"{reply.response_id}: version {reply.policy_version},"
        f" chosen from {reply.num_candidates}{reward}"
    )


if __name__ == "__main__":
    app()
