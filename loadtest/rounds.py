"""A round of our trainer over the same round by the first one, until a version is published."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from loadtest import figures
from loadtest.figures import Figure
from loadtest.fill import HISTORY
from loadtest.first import check_out
from loadtest.history import history_of
from loadtest.work import CANDIDATES, PROMPTS, Line, Work, in_turn
from thumbloop.artifacts import folder_of, read_manifest
from thumbloop.config import State
from thumbloop.processes import ProcessFailed
from thumbloop.store import open_store, reading, versions
from thumbloop.types import BASE_VERSION, DEFAULT_POLICY

_OUT_OF_REACH = 1e9
_WARM_TRAINER = (
    "import runpy, torch._dynamo; runpy.run_module('trainer', run_name='__main__', alter_sys=True)"
)
"""`python -m trainer`, with what PyTorch would load at the first optimizer step."""
GATES: Mapping[str, Mapping[str, Any]] = {
    "ours": {"enabled": False},
    "first": {
        "min_auroc_bound": 0.0,
        "confidence": 0.999999,
        "max_kl": _OUT_OF_REACH,
        "max_update_norm": _OUT_OF_REACH,
    },
}
"""Settings with which neither trainer's gate blocks: what is compared is a round that publishes."""


class Round(NamedTuple):
    """One round: seconds of all of it and of its stages, what it learned from, PPO's optimizer steps, and a
    digest of all files of adapters and critic that it published."""

    seconds: float
    stages_s: Mapping[str, float]
    thumbs: int
    candidates: int
    optimizer_steps: int = 0
    files: str = ""


def round_(work: Work) -> dict[str, Figure]:
    """Time of a demo round over the first trainer's, both from the same state."""
    code = {"ours": Path.cwd(), "first": check_out(work.shared / "first")}
    state = fill_state(work, code["first"])
    turns = {name: partial(run_round, work, name, of, state) for name, of in code.items()}
    return describe_rounds(in_turn(turns, work.repeats))


def fill_state(work: Work, first: Path) -> Path:
    """Make the state folder whose copies rounds start from, with the first trainer's store."""
    found, state, file = work.found, work.folder / "state", work.folder / "history.json"
    rollouts = json.loads(work.freeze().read_text())["rollouts"]
    history = history_of(State(folder=found.state), found.number, rollouts, CANDIDATES)
    file.write_bytes(HISTORY.dump_json(history))
    shutil.rmtree(state, ignore_errors=True)
    for number in (BASE_VERSION, found.number):
        folder = Path("versions") / folder_of(DEFAULT_POLICY, number)
        shutil.copytree(found.state / folder, state / folder)
    script = Path(__file__).with_name("fill.py")
    command = [sys.executable, "-P", str(script), str(file), str(state)]
    work.run("fill", command, environment={"PYTHONPATH": str(first.absolute())})
    return state


def run_round(work: Work, name: str, code: Path, state: Path) -> Round:
    """Let a trainer do a round on a copy of a state. Raises ProcessFailed: it published nothing."""
    own = work.folder.absolute() / name
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(state, own / "state")
    settings = {
        "state": {"folder": str(own / "state")},
        "model": {"path": str(work.found.model.absolute())},
        "metrics": {"port": 0},
        "round": {"max_rounds": 1},
        "gate": dict(GATES[name]),
    }
    config = own / "trainer.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-u", "-c", _WARM_TRAINER, "--config", str(config)]
    done = read_round(work.run(f"{name}-trainer", command, code=code))
    published = State(folder=own / "state")
    return done._replace(
        optimizer_steps=optimizer_steps(published),
        files=files_of(published.versions / folder_of(DEFAULT_POLICY, work.found.number + 1)),
    )


def read_round(lines: Sequence[Line]) -> Round:
    """Return what a trainer said of its only round. Raises ProcessFailed: it published nothing."""

    def find(pattern: str) -> tuple[float, re.Match[str]]:
        for line in lines:
            if found := re.match(pattern, line.words):
                return line.at, found
        words = "\n".join(line.words for line in lines)
        raise ProcessFailed(f"the trainer did not say {pattern!r}, but:\n{words}")

    ready, _ = find(r"training on ")
    _, of = find(r"round \d+: (\d+) new thumbs and (\d+) candidates on version ")
    published, _ = find(r"round \d+: published version ")
    stages = [found for line in lines if (found := re.fullmatch(r"  (.+) (\S+) s", line.words))]
    return Round(
        seconds=published - ready,
        stages_s={found[1].replace(" ", "_"): float(found[2]) for found in stages},
        thumbs=int(of[1]),
        candidates=int(of[2]),
    )


def files_of(version: Path) -> str:
    """Return a digest of a version's files, manifest apart, which names times and the round."""
    listed = sorted(read_manifest(version).files.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def optimizer_steps(state: State) -> int:
    """Return how many steps PPO took in the last round."""
    store = open_store(state)
    try:
        with reading(store) as connection:
            last = versions.list_rounds(connection, DEFAULT_POLICY)[-1]
    finally:
        store.dispose()
    return int(last["metrics"]["optimizer_steps"])


def describe_rounds(rounds: Mapping[str, Sequence[Round]]) -> dict[str, Figure]:
    """Return what rounds took. Raises ProcessFailed: they learned from something else."""
    sizes = {(each.thumbs, each.candidates) for of in rounds.values() for each in of}
    if sizes != {(PROMPTS, PROMPTS * CANDIDATES)}:
        raise ProcessFailed(f"rounds learned from other thumbs and candidates than asked: {sizes}")
    seconds = {name: [each.seconds for each in of] for name, of in rounds.items()}
    found = {
        "round.ratio_to_first": figures.ratio(seconds["ours"], seconds["first"]),
        "round.distinct_versions": figures.exactly(len({each.files for each in rounds["ours"]})),
    }
    for name, of in rounds.items():
        steps = [each.optimizer_steps for each in of]
        found |= {
            f"round.{name}_seconds": figures.of_repeats(seconds[name]),
            f"round.{name}_optimizer_steps": figures.of_repeats(steps),
        }
        for stage in of[0].stages_s:
            taken = [each.stages_s[stage] for each in of]
            found[f"round.{name}_{stage}_s"] = figures.of_repeats(taken)
    return found
