"""The server and the trainer as real processes: started, watched, and stopped without a trace."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

_MIB = 1 << 20
_STARTED = re.compile(r"serving on port (\d+), metrics on (\d+)")
_POLL_S = 0.2
_STOP_TIMEOUT_S = 20.0


class ProcessFailed(Exception):
    """A process of the demo ended by itself; the message says which, and shows its last words."""


class Process:
    """One application of ours, run as `python -m <name> --config <file>` in a session of its own.

    The session keeps Ctrl-C for the demo, which then stops everything in order.
    """

    def __init__(self, name: str, settings: dict[str, Any], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", name, "--config", str(config)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise ProcessFailed when the process has ended."""
        code = self._process.poll()
        if code is not None:
            words = self.log.read_text(errors="replace").strip().splitlines()[-8:]
            raise ProcessFailed(
                f"the {self.name} stopped with exit code {code}; the end of {self.log}:\n"
                + "\n".join(words)
            )

    async def serving_ports(self) -> tuple[int, int]:
        """Wait until the server serves; return its gRPC and metrics ports."""
        while True:
            self.check()
            if started := _STARTED.search(self.log.read_text(errors="replace")):
                return int(started[1]), int(started[2])
            await asyncio.sleep(_POLL_S)

    def memory_mib(self) -> float:
        """Return the proportional memory of the process and all its children, MiB."""
        total = 0
        try:
            family = [psutil.Process(self._process.pid)]
            family += family[0].children(recursive=True)
        except psutil.NoSuchProcess:
            return 0.0
        for member in family:
            try:
                total += member.memory_full_info().pss
            except psutil.Error:
                continue  # it ended while we looked
        return total / _MIB

    def stop(self) -> None:
        """Ask it to finish what it does, wait, and leave no process of its session behind."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass  # it had its chance
        finally:  # a second Ctrl-C, too, leaves nothing running
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


async def peak_memory(processes: Sequence[Process], record: dict[str, float]) -> None:
    """Keep the highest memory of all processes and of this one in `record`, until cancelled."""
    while True:
        own = psutil.Process().memory_full_info().pss / _MIB
        now = own + sum([await asyncio.to_thread(p.memory_mib) for p in processes])
        record["peak_mib"] = max(record.get("peak_mib", 0.0), now)
        await asyncio.sleep(2.0)
