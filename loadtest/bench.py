"""python -m loadtest.bench: our server beside what others offer, in one run; alternated, repeated.

Everything is started here and stopped again. Ratios are what to read; rates are this machine's.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console

from loadtest import figures, midway, results
from loadtest.figures import Figure
from loadtest.midway import NotMidway
from loadtest.overload import overload
from loadtest.plain import lora, plain
from loadtest.reranked import reranked
from loadtest.setting import CallsFailed, Setting
from loadtest.swapping import NotTaken
from loadtest.swaps import swap
from thumbloop.errors import ThumbloopError
from thumbloop.processes import ProcessFailed

TABLE = Path("docs/benchmarks.md")
_BEGIN, _END = "<!-- figures: make bench -->", "<!-- end of figures -->"

PARTS: dict[str, Callable[[Setting], Awaitable[dict[str, Figure]]]] = {
    "plain": plain,
    "lora": lora,
    "reranked": reranked,
    "swap": swap,
    "overload": overload,
}
DTYPES = ["float32", "bfloat16"]

console = Console()


async def measure(setting: Setting, part: str) -> dict[str, Figure]:
    """Measure one part; what it needs is started here, and stopped again."""
    setting.folder.mkdir(parents=True, exist_ok=True)
    measured = await PARTS[part](setting)
    for key, figure in measured.items():
        console.print(f"  {key} {figure.value:.3g} ({figure.low:.3g} to {figure.high:.3g})")
    return measured


def summarise(folder: Path, under: Mapping[str, Any]) -> None:
    """Write serving.json of all that is kept, and the documents' table once nothing is missing."""
    parts = {d: [results.kept(folder / d / part, under) for part in PARTS] for d in DTYPES}
    found = {
        d: {k: f for part in of if part for k, f in part.figures.items()} for d, of in parts.items()
    }
    commits = sorted({part.commit for of in parts.values() for part in of if part})
    report = {
        "conditions": under,
        "commits": commits,
        "figures": {d: {k: f.rounded() for k, f in of.items()} for d, of in found.items()},
    }
    (folder / "serving.json").write_text(json.dumps(report, indent=1) + "\n")
    words = figures.table(found)
    if all(None not in of for of in parts.values()):
        about = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in under.items())
        write_table(TABLE, f"{about}, commit {' and '.join(commits)}.\n\n{words}")
    console.print(words, markup=False)
    console.print(f"Details: {folder / 'serving.json'}")


def write_table(path: Path, words: str) -> None:
    """Put the table between the marks of a document."""
    document = path.read_text()
    before, _, rest = document.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    path.write_text(f"{before}{_BEGIN}\n{words}\n{_END}{after}")


def main(
    dtype: Annotated[list[str], typer.Option(help="float32 and bfloat16 unless given.")] = [],  # noqa: B006
    part: Annotated[list[str], typer.Option(help="All unless given.")] = [],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Of every measurement.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the demo that makes the policy.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where results and logs go.")] = Path("runs/bench"),
) -> None:
    """Measure, and write serving.json: parts that are not asked for are as they were measured last.

    Once all are there, the table in docs/benchmarks.md is written too.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # the same way out as Ctrl-C
    parts, dtypes = part or list(PARTS), dtype or DTYPES
    for option, given, known in (("part", parts, list(PARTS)), ("dtype", dtypes, DTYPES)):
        if unknown := set(given) - set(known):
            print(f"error: --{option}: no {unknown.pop()}; there are {', '.join(known)}")
            raise SystemExit(2)
    try:
        found = midway.find_or_make(folder / "policy", seed)
        console.print(
            f"version {found.number} of {folder / 'policy'},"
            f" {found.thumb_up_rate:.0%} of whose replies are liked"
        )
        under = results.conditions(found, repeats)
        for each in dtypes:
            for name in parts:
                console.print(f"{each}: {name}")
                work = folder / each / name
                setting = Setting(found, each, repeats, work, folder.parent / "peers")
                commit = results.checked_out()  # before: while it runs another may come
                measured = uvloop.run(measure(setting, name))
                results.keep(work, under, measured, commit=commit)
    except (
        NotMidway,
        NotTaken,
        CallsFailed,
        ProcessFailed,
        ThumbloopError,
        subprocess.CalledProcessError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; no process is left behind", file=sys.stderr)
        raise SystemExit(130) from None
    summarise(folder, under)


if __name__ == "__main__":
    typer.run(main)
