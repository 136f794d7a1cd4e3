"""Plain calls with one swap per second over the same calls without."""

from contextlib import AsyncExitStack

from loadtest import figures
from loadtest.figures import Figure
from loadtest.setting import Setting, ours, repeat_numbers
from loadtest.swapping import Swapping
from loadtest.workload import closed_loop
from thumbloop.types import Strategy

_CALLS, _AT_ONCE = 640, 16
_WARM_UP = 16


async def swap(setting: Setting) -> dict[str, Figure]:
    """Throughput of plain calls with one swap per second over throughput without."""
    with_swaps, without, failed = [], [], 0
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(ours(setting))
        swapping = stack.enter_context(Swapping(server.state))
        ask = server.asking(Strategy.NONE, 1)
        versions = (setting.found.other, setting.found.version)
        await closed_loop(ask, range(_WARM_UP), _AT_ONCE)
        for repeat in range(setting.repeats):
            numbers = repeat_numbers(repeat, _CALLS)
            without.append((await closed_loop(ask, numbers, _AT_ONCE)).tokens_per_s)
            async with swapping.every(1.0, versions):
                run = await closed_loop(ask, numbers, _AT_ONCE)
            with_swaps.append(run.tokens_per_s)
            failed += run.failed
    return {
        "swap.throughput_ratio": figures.ratio(with_swaps, without),
        "swap.failed": Figure(failed, failed, failed),
    }
