"""What a trainer leaves that is killed at every step of its rounds: `python -m experiments kills`."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from loadtest import figures
from loadtest.figures import Figure
from loadtest.work import Work

_KILLS = 20
_ANY_MOMENT = "any moment"


def kill(work: Work) -> dict[str, Figure]:
    """Places, kills, and states that were wrong after them."""
    report = work.folder / "kills.json"
    report.unlink(missing_ok=True)
    folder = ("--folder", str(work.folder))
    command = [sys.executable, "-m", "experiments", "kills", "--kills", str(_KILLS), *folder]
    work.run("kills", command, codes=(0, 1))  # 1: something was wrong, which is a figure too
    return describe_kills(json.loads(report.read_text()))


def describe_kills(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Return what the report of `experiments kills` amounts to."""
    kills = [place["kills"] for place in report["places"] if place["place"] != _ANY_MOMENT]
    return {
        "kill.places": figures.exactly(len(kills)),
        "kill.fewest_kills_at_a_place": figures.exactly(min(kills)),
        "kill.kills": figures.exactly(report["kills"]),
        "kill.wrong_states": figures.exactly(report["wrong_states"]),
    }
