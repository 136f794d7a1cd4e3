"""Plain calls with one swap per second over the same calls without."""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from loadtest import figures
from loadtest.figures import Figure
from loadtest.setting import Setting, answers, calling, in_turn, ours
from loadtest.swapping import Swapping
from loadtest.workload import Throughput, closed_loop
from thumbloop.types import Strategy

_CALLS, _AT_ONCE = 640, 16
_INTERVAL_S = 1.0


async def swap(setting: Setting) -> dict[str, Figure]:
    """Throughput of plain calls with one swap per second over throughput without."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(ours(setting))
        swapping = stack.enter_context(Swapping(server.state))
        ask = server.asking(Strategy.NONE, 1)

        async def while_swapping(numbers: range) -> Throughput:
            async with swapping.every(_INTERVAL_S, (setting.found.other, setting.found.version)):
                return await closed_loop(ask, numbers, _AT_ONCE)

        async def without(numbers: range) -> Throughput:
            await swapping.to(setting.found.version)  # not whatever was published last
            return await calling(ask, _AT_ONCE)(numbers)

        turns = {"without": without, "with": while_swapping}
        runs = await in_turn(setting, turns, _CALLS)
    return describe_swaps(runs)


def describe_swaps(runs: Mapping[str, Sequence[Throughput]]) -> dict[str, Figure]:
    """Return the figures of swapping from what calls did `with` and `without`, repeat by repeat."""
    rates = {name: [run.tokens_per_s for run in of] for name, of in runs.items()}
    failed = sum(run.failed for run in runs["with"])
    served = {a.policy_version for a in answers(runs["with"])}
    return {
        "swap.throughput_ratio": figures.ratio(rates["with"], rates["without"]),
        "swap.failed": figures.exactly(failed),
        "swap.versions_served": figures.exactly(len(served)),
        "swap.swaps_per_s": figures.of_repeats([_swaps_per_s(run) for run in runs["with"]]),
    }


def _swaps_per_s(run: Throughput) -> float:
    """Return how often answers came to be another version's: what was published late served nobody."""
    versions = {answer.policy_version for answer in run.answers}
    return (len(versions) - 1) / run.seconds
