"""What the processes of a run take of the memory, all together."""

import asyncio
from collections.abc import Sequence

import psutil

from thumbloop.processes import Process

_MIB = 1 << 20
_INTERVAL_S = 2.0


def memory_mib(pid: int) -> float:
    """Return the proportional memory of a process and all its children, MiB."""
    total = 0
    try:
        family = [psutil.Process(pid)]
        family += family[0].children(recursive=True)
    except psutil.NoSuchProcess:
        return 0.0
    for member in family:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue  # it ended while we looked
    return total / _MIB


async def peak_memory(processes: Sequence[Process], record: dict[str, float]) -> None:
    """Keep the highest memory of all processes and of this one in `record`, until cancelled."""
    while True:
        own = psutil.Process().memory_full_info().pss / _MIB
        now = own + sum([await asyncio.to_thread(memory_mib, p.pid) for p in processes])
        record["peak_mib"] = max(record.get("peak_mib", 0.0), now)
        await asyncio.sleep(_INTERVAL_S)
