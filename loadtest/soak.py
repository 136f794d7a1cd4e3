"""make soak: swaps and kills under load, for long; runs/soak/report.json has what the judge found."""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from loadtest import midway
from loadtest.soak_kills import soak_kills
from loadtest.soak_swaps import soak_swaps
from thumbloop.processes import ProcessFailed

FOLDER = Path("runs/soak")
PARTS = ("swaps", "kills")


async def soak(
    parts: list[str], folder: Path, *, swaps: int, requests: int, apart: int, kills: int, seed: int
) -> dict[str, Any]:
    """Run the parts, and return what is to be reported; each part's journal is in a folder of its own."""
    found = midway.find_or_make(folder / "policy", seed)
    report: dict[str, Any] = {}
    for part in parts:
        where = folder / part
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        if part == "swaps":
            report[part] = await soak_swaps(
                found, where, swaps=swaps, requests=requests, apart=apart, seed=seed
            )
        else:
            report[part] = await soak_kills(found, where, kills=kills, seed=seed)
    return report


def is_clean(report: dict[str, Any]) -> bool:
    """Say whether the judge found nothing wrong."""
    wrong = ("mixed_replies", "unstored_replies", "lost_thumbs", "thumbs_learned_twice")
    failed = report.get("swaps", {}).get("failed", 0)
    has_learned = (
        report.get("kills", {}).get("versions_published", 1) > 0
    )  # else kills proved little
    is_wrong = any(part[name] for part in report.values() for name in wrong)
    return has_learned and not failed and not is_wrong


def main(
    part: Annotated[list[str] | None, typer.Option(help="swaps, kills; absent: both.")] = None,
    swaps: Annotated[int, typer.Option(min=1, help="Swaps under load.")] = 1000,
    requests: Annotated[int, typer.Option(min=1, help="Requests meanwhile, at least.")] = 10_000,
    apart: Annotated[
        int, typer.Option(min=1, help="Swaps with time between, after them: for latencies.")
    ] = 250,
    kills: Annotated[int, typer.Option(min=1, help="kill -9 of server, engine or trainer.")] = 200,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where everything goes.")] = FOLDER,
) -> None:
    """Swap and kill under load, and judge what callers wrote down; exit code 1 where something is wrong."""
    if unknown := set(part or ()) - set(PARTS):
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}", param_hint="--part")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    try:
        report |= uvloop.run(
            soak(
                part or list(PARTS),
                folder,
                swaps=swaps,
                requests=requests,
                apart=apart,
                kills=kills,
                seed=seed,
            )
        )
    except (midway.NotMidway, ProcessFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    raise SystemExit(0 if is_clean(report) else 1)


if __name__ == "__main__":
    typer.run(main)
