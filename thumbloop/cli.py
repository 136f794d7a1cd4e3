"""The `thumbloop` command: ask, chat, rate, see versions and move between them, forget users, take data out and bring it
in, make tokens, look an installation over."""

import hashlib
import json
import secrets
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from thumbloop import exporting, importing, operating, tracing
from thumbloop.client import DEFAULT_ADDRESS, Client, GenerateOptions
from thumbloop.connecting import Address, Authorities, Certificate, Key, Token, WithTls, server
from thumbloop.doctor import command
from thumbloop.streams import ReplyStream
from thumbloop.types import Message, Role, Scope
from thumbloop.v1 import policy_pb2

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.add_typer(operating.app)
app.add_typer(tracing.app)
app.add_typer(exporting.app)
app.add_typer(importing.app)
app.add_typer(command.app)

_KEYS = {"+": True, "u": True, "-": False, "d": False}
_TOKEN_BYTES = 32

User = Annotated[str, typer.Option(help="The user who asks or rates.")]
Strategy = Annotated[
    str | None, typer.Option(help="How the reply is chosen; absent: the server's.")
]
Candidates = Annotated[int | None, typer.Option("--candidates", "-n", help="Candidates sampled.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of the reply.")]


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
    with server(address, token, ca, cert, key, tls) as client:
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
    with server(address, token, ca, cert, key, tls) as client:
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
    with server(address, token, ca, cert, key, tls) as client:
        stored = client.rate(response_id, up=thumb == "up", user_id=user, comment=comment)
        print(f"feedback {stored.feedback_id} for version {stored.policy_version}")


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
