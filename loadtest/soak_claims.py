"""The soak's parts on simulated users: trials of versions, and an attack; each is a command of experiments."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PARTS = ("trials", "attack")
_GOALS = (  # of each kind of canary and verdict: the least and the greatest share of trials
    ("+0.00", "promote", 0.0, 0.05),
    ("-0.05", "promote", 0.0, 0.05),
    ("-0.15", "promote", 0.0, 0.05),
    ("-0.15", "roll_back", 0.95, 1.0),
    ("+0.15", "promote", 0.95, 1.0),
)
_TRIGGER_OVER_BASELINE = 0.02


def run(part: str, folder: Path, *options: str) -> dict[str, Any]:
    """Run the experiment of this name in a process of its own; return what it found.

    Raises subprocess.CalledProcessError: it failed, and has said why.
    """
    command = [sys.executable, "-m", "experiments", part, "--folder", str(folder), *options]
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((folder / f"{part}.json").read_text())
    return found


def missed(report: dict[str, Any]) -> list[str]:
    """Return the goals that were missed, by name."""
    kinds = report.get("trials", {}).get("kinds", {})
    found = [
        f"trials.{name}.{verdict}"
        for name, verdict, low, high in _GOALS
        if name in kinds and not low <= kinds[name][verdict]["share"] <= high
    ]
    attacked = report.get("attack", {}).get("summary", {}).get("attack")
    if attacked and attacked["shown_trigger"]["over_no_attack"]["mean"] > _TRIGGER_OVER_BASELINE:
        found.append("attack.shown_trigger")
    return found
