"""python -m loadtest.bench: our server beside what others offer, in one run; alternated, repeated.

Everything is started here and stopped again. Ratios are what to read; rates are this machine's.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console

from loadtest import figures, midway
from loadtest.figures import Figure
from loadtest.midway import Midway, NotMidway
from loadtest.plain import lora, plain
from loadtest.reranked import reranked
from loadtest.setting import CallsFailed, Setting
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
}

console = Console()


def machine() -> dict[str, Any]:
    """Return where the figures come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "at": time.strftime("%Y-%m-%d", time.gmtime()),
    }


async def measure_all(
    found: Midway, dtypes: list[str], parts: list[str], repeats: int, folder: Path
) -> dict[str, dict[str, Figure]]:
    """Measure every part for every dtype; what one part needs is stopped before the next."""
    results: dict[str, dict[str, Figure]] = {}
    for dtype in dtypes:
        results[dtype] = {}
        for part in parts:
            console.print(f"{dtype}: {part}")
            work = folder / dtype / part
            work.mkdir(parents=True, exist_ok=True)
            setting = Setting(found, dtype, repeats, work, folder.parent / "peers")
            of_part = await PARTS[part](setting)
            results[dtype] |= of_part
            for key, figure in of_part.items():
                console.print(f"  {key} {figure.value:.3g} ({figure.low:.3g} to {figure.high:.3g})")
    return results


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
    """Measure, write serving.json, and, where all was measured, the table in docs/benchmarks.md."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # the same way out as Ctrl-C
    parts, dtypes = part or list(PARTS), dtype or ["float32", "bfloat16"]
    if unknown := set(parts) - PARTS.keys():
        print(f"error: --part: no {unknown.pop()}; there are {', '.join(PARTS)}")
        raise SystemExit(2)
    try:
        found = midway.find_or_make(folder / "policy", seed)
        console.print(
            f"version {found.number} of {folder / 'policy'},"
            f" {found.thumb_up_rate:.0%} of whose replies are liked"
        )
        results = uvloop.run(measure_all(found, dtypes, parts, repeats, folder))
    except (
        NotMidway,
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
    report = {
        "machine": machine(),
        "repeats": repeats,
        "policy_version": found.number,
        "policy_thumb_up_rate": found.thumb_up_rate,
        "figures": {
            dtype: {key: figure.rounded() for key, figure in of_dtype.items()}
            for dtype, of_dtype in results.items()
        },
    }
    (folder / "serving.json").write_text(json.dumps(report, indent=1) + "\n")
    words = figures.table(results)
    if set(parts) == PARTS.keys():
        about = ", ".join(f"{name} {value}" for name, value in report["machine"].items())  # type: ignore[attr-defined]
        write_table(TABLE, f"{about}; {repeats} repeats.\n\n{words}")
    console.print(words, markup=False)
    console.print(f"Details: {folder / 'serving.json'}")


if __name__ == "__main__":
    typer.run(main)
