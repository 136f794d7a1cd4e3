"""`python -m trainer` as a process of its own, forked from one that has imported what takes it seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import yaml

from tests.bench import Bench

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["trainer.training", __name__])


class Forked:
    """A trainer, with as much of `subprocess.Popen` as its tests use."""

    def __init__(self, config: Path) -> None:
        reader, writer = _FORKING.Pipe(duplex=False)
        self._process = _FORKING.Process(target=_run, args=(config, writer), daemon=True)
        self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        reader.close()
        self.pid = self._process.pid
        self.kill, self.terminate = self._process.kill, self._process.terminate

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Read what is left, and wait for the end."""
        with self.stdout:
            output = self.stdout.read()
        self._process.join(timeout)
        return output, None


def _run(config: Path, writer: Connection) -> None:
    """Be `python -m trainer`."""
    for stream in (1, 2):
        os.dup2(writer.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(ROOT)
    os.environ.update(ENVIRONMENT)
    sys.argv = ["trainer", "--config", str(config)]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    runpy.run_module("trainer", run_name="__main__", alter_sys=True)


def start(
    folder: Path, settings: dict, environment: Mapping[str, str] | None = None
) -> Forked | subprocess.Popen:
    """Start a trainer; one with an environment of its own begins with nothing imported, as users' do."""
    config = folder / "trainer.yaml"
    config.write_text(yaml.safe_dump({"metrics": {"port": 0}, **settings}))
    if environment is None:
        return Forked(config)
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "--config", str(config)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: Forked | subprocess.Popen, words: str) -> str:
    """Read lines until one holds the words."""
    seen, deadline = "", time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        seen += line
        if words in line:
            return seen
        if not line:
            break
    raise AssertionError(f"never said {words!r}:\n{seen}")


def failure(folder: Path, settings: dict) -> str:
    """Return the one line that a trainer refuses to start with."""
    process = start(folder, settings)
    output, _ = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 2, output
    (line,) = output.strip().splitlines()
    return line


def settings_of(bench: Bench, state: Path | None = None, **round_settings: int) -> dict:
    """Return settings with which a trainer goes on where the bench ends."""
    settings = bench.config.model_dump(mode="json", exclude_defaults=True)
    settings["state"] = {"folder": str(state or bench.config.state.folder)}
    settings["round"] |= round_settings
    return settings
