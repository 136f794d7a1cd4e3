"""What a trainer leaves that is killed at every step of its rounds: `python -m experiments kills`."""

import json
import sys

from loadtest import figures
from loadtest.figures import Figure
from loadtest.work import Work

_KILLS = 20


def kill(work: Work) -> dict[str, Figure]:
    """Places, kills, and states that were wrong after them."""
    folder = ("--folder", str(work.folder))
    command = [sys.executable, "-m", "experiments", "kills", "--kills", str(_KILLS), *folder]
    work.run("kills", command)
    report = json.loads((work.folder / "kills.json").read_text())
    return {
        "kill.places": figures.exactly(len(report["places"])),
        "kill.fewest_kills_at_a_place": figures.exactly(min(p["kills"] for p in report["places"])),
        "kill.kills": figures.exactly(report["kills"]),
        "kill.wrong_states": figures.exactly(report["wrong_states"]),
    }
