"""python -m loadtest: calls at random moments against any server of ours, and a latency report."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated

import typer
import uvloop

from loadtest import report
from loadtest.ours import PLAIN, Thumbloop, guided
from loadtest.swapping import Swapping
from loadtest.workload import Call, arrivals, mixture, open_loop
from thumbloop.client import DEFAULT_ADDRESS, AsyncClient, GenerateOptions, Tls
from thumbloop.config import State
from thumbloop.connecting import Authorities, Certificate, Key, Token, WithTls, tls_of
from thumbloop.errors import DeadlineExceeded, ThumbloopError, Unavailable
from thumbloop.types import Strategy

PROMPTS = (
    "What did you think of the film?",
    "Was the food any good?",
    "How was the book you read last week?",
    "Would you go to that hairdresser again?",
)
_CONNECT_S = 10.0
_DEADLINE_S = 60.0
_IN_TURN = 2


def options_of(kind: str) -> GenerateOptions:
    """Return how a kind of call asks: `none`, or a strategy and its candidates as `best_of_n:8`.

    Raises ValueError: no such strategy, or no number.
    """
    name, _, count = kind.partition(":")
    strategy = Strategy(name)
    if strategy is Strategy.NONE:
        return PLAIN
    return guided(strategy, int(count or 4))


def shares_of(mix: str) -> dict[str, float]:
    """Read a mixture such as `none=3,soft_best_of_n:4=1`. Raises ValueError with what is wrong."""
    shares: dict[str, float] = {}
    for part in mix.split(","):
        kind, equals, share = part.strip().partition("=")
        try:
            options_of(kind)
            shares[kind] = float(share) if equals else 1.0
        except ValueError as error:
            raise ValueError(f"--mix: {part.strip()!r}: {error}") from None
        if not shares[kind] > 0:
            raise ValueError(f"--mix: {part.strip()!r}: a share has to be above 0")
    return shares


def beside(state: Path | None, swaps: float) -> AbstractAsyncContextManager[None]:
    """Return what goes on beside the load. Raises ValueError: there is nothing to swap to."""
    if not swaps:
        return nullcontext()
    if state is None:
        raise ValueError("--swaps: needs --state, the server's state folder")
    return _swapping(State(folder=state), 1 / swaps)


@asynccontextmanager
async def _swapping(state: State, interval_s: float) -> AsyncIterator[None]:
    with Swapping(state) as swapping:
        if not (sources := swapping.trained()[-_IN_TURN:]):
            raise ValueError("--swaps: this state folder holds no trained version to publish")
        async with swapping.every(interval_s, sources):
            yield


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of whom."""

    address: str
    prompts: tuple[str, ...]
    is_text: bool
    shares: dict[str, float]
    rate: float
    duration_s: float
    seed: int
    deadline_s: float = _DEADLINE_S
    token: str = ""
    tls: Tls | None = None


async def run(load: Load, meanwhile: AbstractAsyncContextManager[None]) -> list[Call]:
    """Send the load, with something else going on meanwhile; return all calls."""
    rng = Random(load.seed)
    async with AsyncClient(load.address, token=load.token, tls=load.tls) as client:
        await asyncio.wait_for(client.versions(), _CONNECT_S)
        target = Thumbloop(client, load.prompts, is_text=load.is_text, deadline_s=load.deadline_s)
        asks = {kind: partial(target.ask, options=options_of(kind)) for kind in load.shares}
        moments = arrivals(load.rate, load.duration_s, rng)
        async with meanwhile:
            return await open_loop(asks, moments, mixture(load.shares, rng))


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """Return a file's lines, or prompts of our own. Raises ValueError: there are none."""
    if file is None:
        return PROMPTS
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"--prompts: {file} cannot be read: {error.strerror}") from None
    if not (prompts := tuple(line for line in lines if line)):
        raise ValueError(f"--prompts: {file} holds no prompt; one a line")
    return prompts


def main(
    address: Annotated[str, typer.Option(help="Where the server listens.")] = DEFAULT_ADDRESS,
    rate: Annotated[float, typer.Option(min=0.01, help="Calls per second.")] = 4.0,
    duration: Annotated[float, typer.Option(min=1, help="Seconds.")] = 30.0,
    mix: Annotated[
        str, typer.Option(help="Kinds of call and their shares: none=3,soft_best_of_n:4=1.")
    ] = "none=1,soft_best_of_n:4=1,speculative_rejection:8=1",
    deadline: Annotated[
        float, typer.Option(min=0.01, help="Seconds after which a call has failed.")
    ] = _DEADLINE_S,
    swaps: Annotated[
        float, typer.Option(min=0, help="Swaps per second; needs --state. 0: none.")
    ] = 0.0,
    state: Annotated[
        Path | None, typer.Option(help="The server's state folder, to publish versions in.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, one a line; absent: a few of ours.")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Texts to continue, for a model without chat template.")
    ] = False,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the moments and the mixture.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("runs/loadtest"),
) -> None:
    """Load a server, and report latencies."""
    try:
        asked = read_prompts(prompts)
        shares, trust = shares_of(mix), tls_of(ca, cert, key, tls)
        load = Load(address, asked, text, shares, rate, duration, seed, deadline, token, trust)
        calls = uvloop.run(run(load, beside(state, swaps)))
    except (Unavailable, DeadlineExceeded, TimeoutError):
        print(f"error: no server answers at {address}; start one with make serve", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, ThumbloopError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    summary = report.summarise(calls, rate, duration)
    report.write(calls, summary, folder)
    print(report.text(summary))
    print(f"Details: {folder}")


if __name__ == "__main__":
    typer.run(main)
