"""The scenes of a trainer's life, rounds of a tiny one, and what a kill may make of each: nothing.

Serving, training and dying happen in forked processes (experiments.forked).
"""

import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.console import Console
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from demo.base_model import Recipe, build
from demo.pretraining import Training
from experiments import forked
from experiments.consistency import Look, Outcome, look
from experiments.failpoints import Watch
from experiments.serving import Service, Setting
from thumbloop.config import Model, State, TrainerConfig
from thumbloop.errors import ThumbloopError
from thumbloop.store import deployments, interactions, open_store, preferences, reading, versions
from thumbloop.types import DEFAULT_POLICY, VersionState
from trainer.assembly import Assembly, assemble
from trainer.metrics import TrainerMetrics

Settings = Mapping[str, Any]

_MODEL = Recipe(
    exchanges=40,
    vocabulary=400,
    layers=1,
    hidden=16,
    intermediate=32,
    heads=2,
    training=Training(rows_per_step=4),
)
_EARLIER = 0.8
_THUMBS = 12
_PREFERENCES = 4
_TRAINER: Settings = {
    "round": {
        "first_feedback": _THUMBS,
        "min_feedback": _THUMBS,
        "min_rollouts": 8,
        "max_rollouts": 24,
        "max_user_factor": 1e9,  # all that was given back is learned: who gave it is another matter
    },
    "lora": {"rank": 2, "alpha": 4},
}
_PUBLISHING: Settings = {"gate": {"enabled": False}}
_BLOCKED: Settings = {"gate": {"max_update_norm": 1e-9}}


class Scene(NamedTuple):
    """A state folder just before a round; what is in it then, and after a trainer that nobody kills.

    `places` are those that such a trainer passes, in order.
    """

    name: str
    seed: int
    folder: Path
    model: Path
    settings: Settings
    before: Outcome
    after: Outcome
    places: tuple[str, ...]
    seconds: float


class Kill(NamedTuple):
    """Where a scene's trainer dies: at a place, or, where that is empty, after some seconds."""

    scene: Scene
    place: str
    after_s: float


def prepare(folder: Path, seed: int) -> list[Scene]:
    """Play all scenes once, undisturbed, each from where the one before ended."""
    stage = Stage(folder, seed)
    scenes = [stage.play("first start", _PUBLISHING)]
    stage.serve()
    scenes.append(stage.play("first round", _PUBLISHING))
    stage.decide({1: VersionState.CURRENT})
    stage.serve()
    scenes.append(stage.play("round with replay", _PUBLISHING))
    stage.decide({2: VersionState.CURRENT})
    stage.serve()
    scenes.append(stage.play("blocked round", _BLOCKED))
    stage.decide({1: VersionState.CURRENT, 2: VersionState.ROLLED_BACK})
    scenes.append(stage.play("round after a rollback", _PUBLISHING))
    stage.decide({3: VersionState.CURRENT})
    stage.serve()
    stage.leave_a_folder_without_a_row()
    scenes.append(stage.play("round after a kill", _PUBLISHING))
    return scenes


class Stage:
    """One state folder, and what server, users and trainer do to it."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Build the base model; the folder is to be empty."""
        self._folder = folder
        self._seed = seed
        self._state = folder / "state"
        self._state.mkdir(parents=True)
        self._model = folder / "model"
        self._log = folder / "child.log"
        self._served = 0
        forked.finish(lambda: build(self._model, recipe=_MODEL), self._log)

    def play(self, name: str, settings: Settings) -> Scene:
        """Let the trainer start and run its round. Raises RuntimeError: even so something is wrong."""
        before = self._folder / name
        shutil.copytree(self._state, before)
        places = self._folder / f"{name}.places"
        started = time.perf_counter()
        forked.finish(
            lambda: _train_and_note(self._state, self._model, settings, places), self._log
        )
        seconds = time.perf_counter() - started
        found = look(self._state)
        if wrong := [*found.wrong, *found.leftovers]:
            raise RuntimeError(f"{name} went wrong undisturbed: {'; '.join(wrong)}")
        return Scene(
            name,
            self._seed,
            before,
            self._model,
            settings,
            look(before).outcome,
            found.outcome,
            tuple(places.read_text().splitlines()),
            seconds,
        )

    def serve(self) -> None:
        """Have the current version answer and be rated until there is enough for a round."""
        self._served += 1
        seed = 100 * self._seed + self._served
        forked.finish(lambda: _serve(self._state, self._model, seed), self._log)

    def decide(self, states: Mapping[int, VersionState]) -> None:
        """Write what the server made of versions."""
        store = open_store(State(folder=self._state))
        with store.begin() as connection:
            for version, state in states.items():
                deployments.set_state(connection, DEFAULT_POLICY, version, state, at=time.time())
        store.dispose()

    def leave_a_folder_without_a_row(self) -> None:
        """Kill a trainer when its version's folder is complete and nothing of it is in the store."""
        place = "before insert into rounds"
        ended = forked.run(
            lambda: _train_until(self._state, self._model, _PUBLISHING, place), self._log
        )
        assert ended.signal == signal.SIGKILL, ended.words


def wrongs(kill: Kill) -> list[str]:
    """Kill a scene's trainer, start another, and return in words what is wrong after either."""
    scene = kill.scene
    with TemporaryDirectory(prefix="thumbloop-kill-") as scratch:
        state, log = Path(scratch, "state"), Path(scratch, "child.log")
        ended = _kill(kill, state, log)
        if ended.words or (kill.place and ended.signal != signal.SIGKILL):
            return [f"the trainer was not killed, it ended by itself: {ended.words}"]
        found = [f"after the kill {words}" for words in _looked(state, scene.before, scene.after)]
        ended = forked.run(lambda: _train(state, scene.model, scene.settings), log)
        if ended != forked.FINISHED:
            found.append(f"the next trainer failed: {ended.words} (signal {ended.signal})")
        return [
            *found,
            *(f"after the next trainer {words}" for words in _looked(state, scene.after)),
        ]


def _kill(kill: Kill, state: Path, log: Path) -> forked.Ended:
    """Let a trainer die in a copy of its scene; one that was done before dies earlier, in another copy."""
    scene, after_s = kill.scene, kill.after_s
    while True:
        shutil.copytree(scene.folder, state)
        ended = forked.run(
            lambda: _train_until(state, scene.model, scene.settings, kill.place),
            log,
            kill_after_s=after_s,
        )
        if kill.place or ended != forked.FINISHED:
            return ended
        shutil.rmtree(state)
        after_s *= _EARLIER


def _looked(state: Path, *expected: Outcome) -> Iterator[str]:
    """Yield what is wrong with a state; what is left over counts once a single outcome is expected."""
    try:
        found = look(state)
    except (ThumbloopError, SQLAlchemyError) as error:
        yield f"the store cannot be read: {error}"
        return
    yield from found.wrong
    if len(expected) == 1:
        yield from found.leftovers
    if found.outcome not in expected:
        yield from _differences(found, expected[-1])


def _differences(found: Look, expected: Outcome) -> Iterator[str]:
    for name, its, wanted in zip(Outcome._fields, found.outcome, expected, strict=True):
        if its != wanted:
            yield f"{name} are other than of a trainer that nobody killed: {its} for {wanted}"[:500]


def _train(state: Path, model: Path, settings: Settings) -> None:
    """Do what a trainer does from its start to the end of a round, if one is due."""
    assembly, store = _start(state, model, settings)
    assembly.loop.step()
    store.dispose()


def _train_until(state: Path, model: Path, settings: Settings, place: str) -> None:
    Watch(State(folder=state).versions, kill_at=place).install()
    _train(state, model, settings)


def _train_and_note(state: Path, model: Path, settings: Settings, places: Path) -> None:
    watch = Watch(State(folder=state).versions)
    watch.install()
    _train(state, model, settings)
    places.write_text("\n".join(watch.passed))


def _start(state: Path, model: Path, settings: Settings) -> tuple[Assembly, Engine]:
    config = TrainerConfig(
        state=State(folder=state), model=Model(path=str(model)), **{**_TRAINER, **settings}
    )
    store = open_store(config.state)
    metrics = TrainerMetrics(state / "tensorboard", Console(quiet=True))
    return assemble(config, model, store, metrics), store


def _serve(state: Path, model: Path, seed: int) -> None:
    assembly, store = _start(state, model, {})
    with reading(store) as connection:
        version = versions.current(connection, DEFAULT_POLICY)
    if version.policy_digest:
        assembly.trunk.load(State(folder=state).versions / version.folder)
    setting = Setting(seed=seed, max_tokens=8, num_candidates=2)
    service = Service(setting, assembly, store)
    while service.thumbs < _THUMBS:
        service.serve(_THUMBS // 2, version)
    _compare(store, version.version)
    store.dispose()


def _compare(store: Engine, version: int) -> None:
    """Have users prefer the longer of the two candidates of a version's latest replies."""
    with store.begin() as connection:
        replies = interactions.list_since(connection, DEFAULT_POLICY, version)
        for reply in replies[-_PREFERENCES:]:
            better = max(reply.candidates, key=lambda each: len(each.token_ids)).index
            preferences.submit_preference(
                connection, reply.response_id, better, 1 - better, reply.user, at=time.time()
            )
