"""make soak: swaps and kills under load, trials and an attack, for long; runs/soak/report.json has what was found."""

import asyncio
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from loadtest import midway, soak_claims
from loadtest.soak_kills import soak_kills
from loadtest.soak_swaps import soak_swaps
from loadtest.swapping import NotTaken
from thumbloop.processes import ProcessFailed

FOLDER = Path("runs/soak")
PARTS = ("swaps", "kills", *soak_claims.PARTS)
_FIRST_REPLY_S = 1.0
_P99_RATIO = 1.1
_ROLLBACK_S = 1.0


async def soak(
    part: str,
    folder: Path,
    *,
    swaps: int,
    requests: int,
    apart: int,
    rollbacks: int,
    kills: int,
    seed: int,
) -> dict[str, Any]:
    """Run a part, and return what is to be reported; its journal is in a folder of its own."""
    where = folder / part
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    if part in soak_claims.PARTS:
        return await asyncio.to_thread(soak_claims.run, part, where)
    found = midway.find_or_make(folder / "policy", seed)
    if part == "swaps":
        return await soak_swaps(
            found,
            where,
            swaps=swaps,
            requests=requests,
            apart=apart,
            rollbacks=rollbacks,
            seed=seed,
        )
    return await soak_kills(found, where, kills=kills, seed=seed)


def wrongs(report: dict[str, Any]) -> list[str]:
    """Return what the judge found wrong, by name; also what was not proven."""
    names = [
        *("mixed_replies", "unstored_replies", "lost_thumbs", "thumbs_learned_twice"),
        *("failed", "alone_failed", "not_serving", "not_taken", "thumbs_stored_twice"),
        *("not_one_current", "users_on_both_sides", "answered_after_rollback", "lost_moves"),
        "crashed",
    ]
    found = [f"{part}.{name}" for part in report for name in names if report[part].get(name)]
    if "kills" in report:  # kills of what learns nothing, or where nothing moves, prove little
        needed = ("versions_published", "trials", "operators_moves")
        found += [f"kills.{name}" for name in needed if not report["kills"].get(name)]
    if "swaps" in report and not report["swaps"].get("prompts_told_apart"):
        found.append("swaps.prompts_told_apart")  # where all say the same, nothing can be mixed
    return found


def missed(report: dict[str, Any]) -> list[str]:
    """Return the goals that were missed, by name: times, which are the machine's, too, and shares of runs."""
    return _missed_by_swaps(report) + soak_claims.missed(report)


def _missed_by_swaps(report: dict[str, Any]) -> list[str]:
    """Return the goals of swaps that were missed; what was not measured in their part was not met."""
    if "swaps" not in report:
        return []
    apart, found = report["swaps"]["apart"], []
    first_reply_s = apart["publish_to_first_reply_s"].get("p99", math.inf)
    if apart["never_answered"] or not first_reply_s <= _FIRST_REPLY_S:
        found.append("swaps.apart.publish_to_first_reply_s")
    if not apart["latency_s"].get("p99_ratio", math.inf) <= _P99_RATIO:
        found.append("swaps.apart.latency_s.p99_ratio")
    back = report["swaps"].get("rollbacks", {})
    if back.get("refused") or not back.get("taken_s", {}).get("p100", math.inf) <= _ROLLBACK_S:
        found.append("swaps.rollbacks.taken_s")
    return found


def main(
    part: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; absent: all.")
    ] = None,
    swaps: Annotated[int, typer.Option(min=1, help="Swaps under load.")] = 1000,
    requests: Annotated[int, typer.Option(min=1, help="Requests meanwhile, at least.")] = 10_000,
    apart: Annotated[
        int, typer.Option(min=1, help="Swaps with time between, after them: for latencies.")
    ] = 250,
    rollbacks: Annotated[
        int, typer.Option(min=0, help="Swaps that an operator takes back, after those.")
    ] = 25,
    kills: Annotated[int, typer.Option(min=1, help="kill -9 of server, engine or trainer.")] = 200,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where everything goes.")] = FOLDER,
) -> None:
    """Swap and kill under load, judge what callers wrote down, try and attack; exit code 1 where something is wrong."""
    if unknown := set(part or ()) - set(PARTS):
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}", param_hint="--part")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for each in part or PARTS:
        try:
            report[each] = uvloop.run(
                soak(
                    each,
                    folder,
                    swaps=swaps,
                    requests=requests,
                    apart=apart,
                    rollbacks=rollbacks,
                    kills=kills,
                    seed=seed,
                )
            )
        except (
            midway.NotMidway,
            ProcessFailed,
            NotTaken,
            subprocess.CalledProcessError,
        ) as error:
            print(f"error: {each}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    print("goals missed:", ", ".join(missed(report)) or "none")
    if wrong := wrongs(report):
        print("wrong:", ", ".join(wrong))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
