"""Places where a trainer can be killed, found from outside: before and after every step that has to last.

What is watched: what the trainer does to the folder of versions, every transaction that writes, and the
stages of a round. All of it is replaced in this process for good, so that it has to be a child's.
"""

import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine.default import DefaultDialect

from trainer.metrics import TrainerMetrics

_TEMPORARY = re.compile(r"\.\d{6}\.\d+\.tmp")
_VERSION = re.compile(r"\b\d{6}\b")
_CHANGE = re.compile(r"(INSERT INTO|UPDATE|DELETE FROM) (\w+)")
_FILES = (
    (os, "fsync", "sync"),
    (os, "mkdir", "make"),
    (os, "rename", "rename"),
    (os, "unlink", "unlink"),
    (shutil, "rmtree", "remove"),
    (Path, "write_bytes", "write"),
)
"""Functions that change files, and what that is called."""


class Watch:
    """Names the places that this process passes; kills it with SIGKILL at one of them.

    A place that is passed again has its number behind its name.
    """

    def __init__(self, folder: Path, kill_at: str | None = None) -> None:
        """Watch the folder of versions; `kill_at` names a place."""
        self._folder = folder.resolve()
        self._kill_at = kill_at
        self._passes: Counter[str] = Counter()
        self._changed: list[str] | None = None  # tables, in a transaction that writes
        self.passed: list[str] = []

    def reach(self, place: str) -> None:
        """Note a place, and die there if it is the one."""
        self._passes[place] += 1
        if self._passes[place] > 1:
            place = f"{place} ({self._passes[place]})"
        self.passed.append(place)
        if place == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Put a place before and after everything that is watched."""
        for owner, function, verb in _FILES:
            self._watch(owner, function, verb, self._name)
        self._watch(DefaultDialect, "do_commit", "commit of", self._committed)
        event.listen(Engine, "before_cursor_execute", self._before_statement)
        event.listen(Engine, "after_cursor_execute", self._after_statement)
        self._watch_stages()

    def _watch(self, owner: Any, name: str, verb: str, describe: Callable[..., str | None]) -> None:
        """Replace a function by one that passes two places, where `describe` has a name for its call."""
        real = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            what = describe(*args, **options)
            if what is None:
                return real(*args, **options)
            with self._around(f"{verb} {what}"):
                return real(*args, **options)

        setattr(owner, name, watched)

    @contextmanager
    def _around(self, what: str) -> Iterator[None]:
        self.reach(f"before {what}")
        yield
        self.reach(f"after {what}")

    def _name(
        self, path: Any, *_args: Any, dir_fd: int | None = None, **_options: Any
    ) -> str | None:
        """Return what a path, or an open file, is among the versions; None: it is none of them."""
        if dir_fd is not None:
            path = Path(f"/proc/self/fd/{dir_fd}").readlink() / path
        elif isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        place = Path(path).absolute()
        if not place.is_relative_to(self._folder):
            return None
        name = place.relative_to(self._folder).as_posix()
        return _VERSION.sub("version", _TEMPORARY.sub("temporary", name))

    def _watch_stages(self) -> None:
        real = TrainerMetrics.stage

        @contextmanager
        def stage(metrics: TrainerMetrics, name: str) -> Iterator[None]:
            with self._around(f"stage {name}"), real(metrics, name):
                yield

        TrainerMetrics.stage = stage  # type: ignore[method-assign, assignment]

    def _before_statement(
        self, _connection: Any, _cursor: Any, statement: str, *_rest: Any
    ) -> None:
        if changed := _CHANGE.match(statement.lstrip()):
            self.reach(f"before {changed[1].lower()} {changed[2]}")

    def _after_statement(self, _connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("BEGIN"):
            self._changed = [] if statement == "BEGIN IMMEDIATE" else None
        elif changed := _CHANGE.match(statement.lstrip()):
            if self._changed is not None and changed[2] not in self._changed:
                self._changed.append(changed[2])
            self.reach(f"after {changed[1].lower()} {changed[2]}")

    def _committed(self, *_args: Any) -> str | None:
        """Return the tables that a commit changes; None: of a transaction that only read."""
        changed, self._changed = self._changed, None
        return None if changed is None else ", ".join(changed) or "nothing"
