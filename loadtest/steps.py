"""One PPO update of ours beside TRL's on the same frozen rollouts, each in a process of its own."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from loadtest import figures
from loadtest.environments import environment
from loadtest.figures import Figure
from loadtest.work import Work, in_turn

PEERS = {"trl_0_11": "trl-0.11.4", "trl_1_12": "trl-1.12.0"}
"""TRL's two trainers, of which loadtest.trl.step_<number> runs each, and their environments."""
IN_PARTS = "trl_0_11_in_parts"
"""The first of them once more, as it takes the least memory: minibatches in so many passes."""
_PARTS = 4
_MIB = 1 << 20

Line = Mapping[str, Any]
"""What a process says: seconds, optimizer_steps, peak_bytes, before_bytes; ours also passes_s."""


def step(work: Work) -> dict[str, Figure]:
    """Time of an update, of its passes alone, and the memory it takes, over the peers'."""
    pythons = {
        name: environment(lock, work.shared / "environments") for name, lock in PEERS.items()
    }
    job = str(work.freeze())
    commands = {"ours": [sys.executable, "-m", "experiments.update", job]}
    for name, python in pythons.items():
        module = f"loadtest.trl.{name.replace('trl', 'step')}"
        commands[name] = [str(python), "-m", module, job]
    commands[IN_PARTS] = [*commands["trl_0_11"], str(_PARTS)]
    turns = {name: partial(work.measured, name, command) for name, command in commands.items()}
    return describe_steps(in_turn(turns, work.repeats))


def describe_steps(lines: Mapping[str, Sequence[Line]]) -> dict[str, Figure]:
    """Return what the processes' lines amount to, repeat by repeat."""
    seconds = {name: [median(line["seconds"]) for line in of] for name, of in lines.items()}
    peaks = {name: [line["peak_bytes"] / _MIB for line in of] for name, of in lines.items()}
    passes = [median(line["passes_s"]) for line in lines["ours"]]
    lower = [min(both) for both in zip(*(peaks[name] for name in PEERS), strict=True)]
    found = {
        f"step.ratio_to_{name}": figures.ratio(seconds["ours"], seconds[name]) for name in PEERS
    }
    found |= {
        "step.floor_ratio_to_trl_0_11": figures.ratio(passes, seconds["trl_0_11"]),
        "step.memory_ratio": figures.ratio(peaks["ours"], lower),
        "step.memory_ratio_in_parts": figures.ratio(peaks["ours"], peaks[IN_PARTS]),
        "step.ours_passes_s": figures.of_repeats(passes),
    }
    for name, of in lines.items():
        before = [line["before_bytes"] / _MIB for line in of]
        found |= {
            f"step.{name}_seconds": figures.of_repeats(seconds[name]),
            f"step.{name}_optimizer_steps": figures.of_repeats(
                [line["optimizer_steps"] for line in of]
            ),
            f"step.{name}_peak_mib": figures.of_repeats(peaks[name]),
            f"step.{name}_before_mib": figures.of_repeats(before),
        }
    return found
