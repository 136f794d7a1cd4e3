"""Applications as processes: started, watched, and stopped without a trace."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

_SERVING = r"serving on port (\d+), metrics on (\d+)"
_POLL_S = 0.2
_STOP_TIMEOUT_S = 20.0


class ProcessFailed(Exception):
    """A process ended by itself; the message says which, and shows its last words."""


class Process:
    """A command in a session of its own, which keeps Ctrl-C for whoever started it.

    What it prints goes to `<name>.log` in the folder.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=None if environment is None else os.environ | environment,
            )
        self.pid = self._process.pid

    @classmethod
    def of_application(cls, name: str, settings: dict[str, Any], folder: Path) -> "Process":
        """Start one application of ours: `python -m <name> --config <file>`."""
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        return cls(name, [sys.executable, "-m", name, "--config", str(config)], folder)

    def check(self) -> None:
        """Raise ProcessFailed when the process has ended."""
        code = self._process.poll()
        if code is not None:
            words = self.log.read_text(errors="replace").strip().splitlines()[-8:]
            raise ProcessFailed(
                f"the {self.name} stopped with exit code {code}; the end of {self.log}:\n"
                + "\n".join(words)
            )

    async def says(self, pattern: str) -> re.Match[str]:
        """Wait until the log holds the pattern. Raises ProcessFailed: it ended before."""
        while True:
            self.check()
            if found := re.search(pattern, self.log.read_text(errors="replace")):
                return found
            await asyncio.sleep(_POLL_S)

    async def serving_ports(self) -> tuple[int, int]:
        """Wait until our server serves; return its gRPC and metrics ports."""
        found = await self.says(_SERVING)
        return int(found[1]), int(found[2])

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
