"""python -m loadtest.bench: our server beside what others offer, in one run; alternated, repeated.

Everything is started here and stopped again. Ratios are what to read; rates are this machine's.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from loadtest.benchmark import Benchmark
from loadtest.figures import Figure, Goal
from loadtest.midway import Midway
from loadtest.overload import overload
from loadtest.plain import lora, plain
from loadtest.reranked import reranked
from loadtest.setting import CallsFailed, Setting
from loadtest.swapping import NotTaken
from loadtest.swaps import swap

PARTS: dict[str, Callable[[Setting], Awaitable[dict[str, Figure]]]] = {
    "plain": plain,
    "lora": lora,
    "reranked": reranked,
    "swap": swap,
    "overload": overload,
}
SERVING = Benchmark(
    name="serving",
    command="make bench",
    parts=list(PARTS),
    dtypes=["float32", "bfloat16"],
    goals={
        "plain.ratio_to_bare": Goal(0.97),
        "plain.added_ms_p50": Goal(3, is_upper=True),
        "lora.ratio_to_base": Goal(0.90),
        "lora.ratio_to_base_1": Goal(0.85),
        "lora.ratio_mixed": Goal(0.87),
        "reranked.ratio_to_peer": Goal(2.2),
        "reranked.ratio_at_equal_reward": Goal(3),
        "pruned.gain_kept": Goal(0.90),
        "pruned.tokens_share": Goal(0.70, is_upper=True),
        "swap.throughput_ratio": Goal(0.95),
        "swap.failed": Goal(0, is_upper=True),
        "overload.goodput_ratio": Goal(0.90),
        "overload.p99_ratio": Goal(2, is_upper=True),
        "overload.reject_ms_p50": Goal(50, is_upper=True),
    },
    failures=(NotTaken, CallsFailed),
)


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

    async def measured(setting: Setting, name: str) -> dict[str, Figure]:
        return await PARTS[name](setting)

    def measure(found: Midway, of_dtype: str, name: str, work: Path) -> dict[str, Figure]:
        setting = Setting(found, of_dtype, repeats, work, folder.parent / "peers")
        figures: dict[str, Figure] = uvloop.run(measured(setting, name))
        return figures

    SERVING.run(measure, dtypes=dtype, parts=part, repeats=repeats, seed=seed, folder=folder)


if __name__ == "__main__":
    typer.run(main)
