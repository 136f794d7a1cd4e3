"""A policy in the middle of learning, from a run of the demo: there is a gain for guidance to have.

The run is kept, so that later benchmarks measure the same version.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from thumbloop.artifacts import read_manifest
from thumbloop.config import State
from thumbloop.rendering import VerdictTokens
from thumbloop.store import interactions, open_store, reading
from thumbloop.types import BASE_VERSION, DEFAULT_POLICY

RATES = (0.4, 0.7)
"""Thumb-up rates of a policy that is half way."""
_ROUNDS = 3
_PROMPTS = 400


class NotMidway(Exception):
    """The demo ran, but none of its versions is half way; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Midway:
    """One version, the one before or after it to swap with, and what users asked in that run.

    `run` is the folder of the run: its report, and its state.
    """

    run: Path
    model: Path
    version: Path
    other: Path
    number: int
    thumb_up_rate: float
    verdict: VerdictTokens
    texts: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]

    @property
    def state(self) -> Path:
        """Return the folder of the run's store and versions."""
        return self.run / "state"

    @property
    def trained(self) -> tuple[Path, ...]:
        """Return the folders of all versions that the run trained, oldest first."""
        folders = self.version.parent.glob("[0-9]*")
        return tuple(sorted(folder for folder in folders if int(folder.name) != BASE_VERSION))


def find_or_make(folder: Path, seed: int) -> Midway:
    """Return the version nearest to half way of the demo's run in `folder`, made if missing.

    Raises NotMidway, and subprocess.CalledProcessError where the demo fails.
    """
    if not (folder / "report.json").is_file():
        command = [sys.executable, "-m", "demo", "--rounds", str(_ROUNDS), "--seed", str(seed)]
        _run([*command, "--folder", str(folder)])
    report = json.loads((folder / "report.json").read_text())
    number, rate = choose(report["versions"])
    state = State(folder=folder / "state")
    settings = yaml.safe_load((folder / "server.yaml").read_text())
    texts, prompts = _asked(state)
    trained = [int(v["policy_version"]) for v in report["versions"] if v["policy_version"]]
    other = min((n for n in trained if n != number), key=lambda n: abs(n - number))
    version = state.versions / DEFAULT_POLICY / f"{number:06d}"
    verdict = read_manifest(version).verdict
    assert verdict is not None, "a trained version has a verdict prompt"
    return Midway(
        run=folder,
        model=Path(settings["model"]["path"]),
        version=version,
        other=version.with_name(f"{other:06d}"),
        number=number,
        thumb_up_rate=rate,
        verdict=VerdictTokens(verdict.prompt, verdict.up, verdict.down, is_special=True),
        texts=texts,
        prompts=prompts,
    )


def _run(command: list[str]) -> None:
    """Run a command to its end; one that is interrupted gets to stop what it has started itself.

    Raises subprocess.CalledProcessError.
    """
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()  # of Popen's own accord not after Ctrl-C
            raise
    if code:
        raise subprocess.CalledProcessError(code, command)


def choose(versions: list[dict[str, Any]]) -> tuple[int, float]:
    """Return number and thumb-up rate of the trained version nearest to half way.

    Raises NotMidway: none lies within RATES, or there is no second one to swap with.
    """
    low, high = RATES
    rated = [
        (int(v["policy_version"]), float(v["policy_thumb_up_rate"]))
        for v in versions
        if v["policy_version"] and v["policy_thumb_up_rate"] is not None
    ]
    midway = [(number, rate) for number, rate in rated if low <= rate <= high]
    if not midway or len(rated) < 2:
        raise NotMidway(
            f"no version of this run has a thumb-up rate in [{low}, {high}] and another beside it:"
            f" {dict(rated)}; remove its folder and take another SEED"
        )
    return min(midway, key=lambda found: abs(found[1] - (low + high) / 2))


def _asked(state: State) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Return distinct prompts that users sent, as text and as token ids."""
    database = open_store(state)
    try:
        with reading(database) as connection:
            stored = interactions.list_since(connection, DEFAULT_POLICY, 0)
    finally:
        database.dispose()
    by_text = {i.prompt.messages[-1].content: i.prompt_token_ids for i in stored}
    chosen = list(by_text.items())[:_PROMPTS]
    return tuple(text for text, _ in chosen), tuple(ids for _, ids in chosen)
