"""What was measured, kept part by part: one part can be measured again without the others."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loadtest.figures import Figure
from loadtest.midway import Midway

_FILE = "figures.json"


def conditions(found: Midway, repeats: int) -> dict[str, Any]:
    """Return what figures have to share to stand in one table."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "vllm": installed(packages_distributions()["vllm"][0]),
        "policy_version": found.number,
        "policy_thumb_up_rate": found.thumb_up_rate,
        "repeats": repeats,
    } | gpus()


def gpus() -> dict[str, str]:
    """Return the name of the GPU that is measured on, nothing where there is none."""
    return {"gpu": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {}


class Kept(NamedTuple):
    """A part's figures, and the commit that was measured."""

    commit: str
    figures: dict[str, Figure]


def checked_out() -> str:
    """Return which commit is checked out, `-dirty` where files were changed since; unknown outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def keep(
    folder: Path, under: Mapping[str, Any], measured: Mapping[str, Figure], *, commit: str
) -> None:
    """Write a part's figures into its folder, in the place of older ones."""
    content = {
        "commit": commit,
        "at": time.strftime("%Y-%m-%d", time.gmtime()),
        "conditions": under,
        "figures": {key: figure.rounded() for key, figure in measured.items()},
    }
    (folder / _FILE).write_text(json.dumps(content, indent=1) + "\n")


def kept(folder: Path, under: Mapping[str, Any]) -> Kept | None:
    """Return what is kept of a part, or None where there are none that were measured under these conditions."""
    try:
        content = json.loads((folder / _FILE).read_text())
    except FileNotFoundError:
        return None
    if content["conditions"] != under:
        return None
    figures = {key: Figure(**of) for key, of in content["figures"].items()}
    return Kept(content["commit"], figures)
