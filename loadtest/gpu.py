"""One PPO update at 0.5 B parameters on a GPU, beside TRL's: where there is one."""

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

import torch

from loadtest import figures
from loadtest.environments import environment
from loadtest.figures import Figure
from loadtest.steps import PEERS, Line
from loadtest.work import Work, in_turn

_PEER = "trl_1_12"
_MIB = 1 << 20


def gpu(work: Work) -> dict[str, Figure]:
    """Time of an update in bfloat16 and the GPU's memory, over the peer's; nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    python = environment(PEERS[_PEER], work.shared / "environments", has_gpu=True)
    # One of them: a trainer of transformers takes all that it sees.
    seen = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    job = str(work.folder / "job.json")
    made = [sys.executable, "-m", "experiments.sized", str(work.folder / "model"), job]
    work.run("sized", made, environment=seen)
    commands = {
        "ours": [sys.executable, "-m", "experiments.update", job],
        _PEER: [str(python), "-m", "loadtest.trl.step_1_12", job],
    }
    turns = {
        name: partial(work.measured, name, command, seen) for name, command in commands.items()
    }
    return describe_updates(in_turn(turns, work.repeats))


def describe_updates(lines: Mapping[str, Sequence[Line]]) -> dict[str, Figure]:
    """Return what the processes' lines amount to, repeat by repeat."""
    seconds = {name: [median(line["seconds"]) for line in of] for name, of in lines.items()}
    peaks = {name: [line["peak_bytes"] / _MIB for line in of] for name, of in lines.items()}
    found = {
        "gpu.bfloat16.ratio_to_trl_1_12": figures.ratio(seconds["ours"], seconds[_PEER]),
        "gpu.bfloat16.memory_ratio": figures.ratio(peaks["ours"], peaks[_PEER]),
    }
    for name in lines:
        found[f"gpu.bfloat16.{name}_seconds"] = figures.of_repeats(seconds[name])
        found[f"gpu.bfloat16.{name}_peak_mib"] = figures.of_repeats(peaks[name])
    return found
