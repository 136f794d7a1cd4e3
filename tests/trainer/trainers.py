"""`python -m trainer` as a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import yaml

from tests.bench import Bench

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120


def start(
    folder: Path, settings: dict, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen:
    config = folder / "trainer.yaml"
    config.write_text(yaml.safe_dump({"metrics": {"port": 0}, **settings}))
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "--config", str(config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen, words: str) -> str:
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
