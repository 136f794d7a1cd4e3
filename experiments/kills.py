"""A trainer is killed at every step of its rounds; whatever was done then is there once, and the next goes on."""

import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import typer

from experiments.forked import HUNG_S
from experiments.options import FOLDER, Folder, Jobs, Seeds
from experiments.report import console, write
from experiments.survival import Kill, Scene, prepare, wrongs

ANY_MOMENT = "any moment"
_SAY_EVERY = 100


class Killed(NamedTuple):
    """One kill, and in words what was wrong after it."""

    place: str
    scene: str
    wrong: list[str]


def plan(scenes: Sequence[Scene], kills: int, seed: int = 0) -> Iterator[Kill]:
    """Yield the kills: as many at each place, over all scenes that pass it, and in each scene at any moment."""
    passing: dict[str, list[Scene]] = {}
    for scene in scenes:
        for place in scene.places:
            passing.setdefault(place, []).append(scene)
    for place, its_scenes in passing.items():
        for scene in islice(cycle(its_scenes), kills):
            yield Kill(scene, place, HUNG_S)
    random = Random(seed)
    names = dict.fromkeys(scene.name for scene in scenes)
    for name in names:
        for scene in islice(cycle(s for s in scenes if s.name == name), kills):
            yield Kill(scene, "", random.uniform(0.0, scene.seconds))


def carry_out(kill: Kill) -> Killed:
    """Kill, start again, look."""
    return Killed(kill.place or ANY_MOMENT, kill.scene.name, wrongs(kill))


def summarise(killed: Sequence[Killed]) -> list[dict[str, Any]]:
    """Return for each place how often a trainer was killed there, and what was wrong how often."""
    rows = []
    for place in dict.fromkeys(each.place for each in killed):
        its = [each for each in killed if each.place == place]
        rows.append(
            {
                "place": place,
                "kills": len(its),
                "scenes": dict(Counter(each.scene for each in its)),
                "wrong_states": sum(bool(each.wrong) for each in its),
                "wrong": dict(Counter(words for each in its for words in each.wrong)),
            }
        )
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each place, and below it what was wrong."""
    width = max(len(row["place"]) for row in rows)
    console.print(f"{'killed':{width}}  kills  wrong states")
    for row in rows:
        console.print(f"{row['place']:{width}}  {row['kills']:5}  {row['wrong_states']:12}")
        for words, count in row["wrong"].items():
            console.print(f"    {count} times: {words}", markup=False)


def main(
    kills: Annotated[int, typer.Option(min=1, help="Kills at each place.")] = 20,
    seeds: Seeds = 4,
    jobs: Jobs = 1,
    folder: Folder = FOLDER,
) -> None:
    """What is wrong after a trainer was killed, at every step of six kinds of rounds: nothing should be."""
    started = perf_counter()
    context = multiprocessing.get_context("spawn")  # processes that have run no torch operation
    with (
        TemporaryDirectory(prefix="thumbloop-kills-") as scratch,
        ProcessPoolExecutor(jobs, mp_context=context) as pool,
    ):
        folders = [Path(scratch, str(seed)) for seed in range(seeds)]
        scenes = [s for played in pool.map(prepare, folders, range(seeds)) for s in played]
        killed = []
        for each in pool.map(carry_out, plan(scenes, kills)):
            killed.append(each)
            if len(killed) % _SAY_EVERY == 0:
                wrong = sum(bool(k.wrong) for k in killed)
                console.print(f"{len(killed)} kills, {wrong} wrong states")
    rows = summarise(killed)
    show(rows)
    wrong = sum(row["wrong_states"] for row in rows)
    console.print(f"{len(killed)} kills at {len(rows)} places: {wrong} wrong states")
    report = {"kills": len(killed), "wrong_states": wrong, "seconds": perf_counter() - started}
    write(folder, "kills", {**report, "seeds": seeds, "places": rows})
    if wrong:
        raise typer.Exit(1)
