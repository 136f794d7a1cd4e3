"""What parts of `make bench-learning` have: the policy, a folder, commands run to their end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

from loadtest.midway import Midway
from thumbloop.processes import ProcessFailed

PROMPTS, CANDIDATES = 64, 4
"""The demo's round."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
"""One thread, no GPU, no network."""
_LAST_LINES = 8

T = TypeVar("T")


class Line(NamedTuple):
    """What a command said, and when, in seconds of `perf_counter`."""

    at: float
    words: str


@dataclass(frozen=True, slots=True)
class Work:
    """What a measurement is given; `shared` holds what outlives it, environments for instance."""

    found: Midway
    repeats: int
    folder: Path
    shared: Path

    def freeze(self) -> Path:
        """Write a round's rollouts by the policy's version, scored, as a file; return it."""
        job, number = self.folder / "job.json", str(self.found.number)
        size = ("--prompts", str(PROMPTS), "--candidates", str(CANDIDATES))
        arguments = (str(self.found.state), str(self.found.model), number, str(job), *size)
        self.run("frozen", [sys.executable, "-m", "experiments.frozen", *arguments])
        return job

    def measured(
        self, name: str, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Run a command; return the JSON of the last line that it prints. Raises ProcessFailed."""
        lines = self.run(name, command, environment=environment)
        line: dict[str, Any] = json.loads(lines[-1].words)
        return line

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        code: Path | None = None,
        environment: dict[str, str] | None = None,
        codes: Collection[int] = (0,),
    ) -> list[Line]:
        """Run a command in the folder of its code; return what it prints.

        Its errors go to <name>.log. Raises ProcessFailed: it ended with another code than these.
        """
        log = self.folder / f"{name}.log"
        with (
            log.open("wb") as errors,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=code,
                env=os.environ | _ENVIRONMENT | (environment or {}),
                text=True,
                start_new_session=True,
            ) as process,
        ):
            assert process.stdout is not None
            try:
                lines = [Line(perf_counter(), line.rstrip("\n")) for line in process.stdout]
                process.wait()
            except BaseException:  # Ctrl-C, for instance: nothing is left running
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode not in codes:
            words = log.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
            raise ProcessFailed(
                f"{name} stopped with exit code {process.returncode}; the end of {log}:\n"
                + "\n".join(words)
            )
        return lines


def in_turn(turns: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Take turns, as often as there are repeats; return what came of each.

    The order is turned round with every repeat: a machine that grows slower favours nobody.
    """
    results: dict[str, list[T]] = {name: [] for name in turns}
    for repeat in range(repeats):
        for name in list(turns)[:: -1 if repeat % 2 else 1]:
            results[name].append(turns[name]())
    return results
