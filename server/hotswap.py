"""Versions -> engine: verify, load, attest, route, drain, unload. Never reloads in place.

Every step writes to the store what became of the version; a version that fails any of them is
rejected with the reason, and the one before goes on serving.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from server.attestation import attest
from server.delivery import Action, Reject, Restore, Try, Unload, plan
from server.engine import Adapter, Engine
from server.routes import LoadedVersion, Routes
from server.verification import Expected, verify
from thumbloop import artifacts
from thumbloop.config.server import Delivery
from thumbloop.errors import (
    BadPolicyVersion,
    EngineUnavailable,
    Overloaded,
    SettingsError,
    StoreUnavailable,
    ThumbloopError,
)
from thumbloop.store import GroupWriter, reading, versions
from thumbloop.types import BASE_VERSION, DEFAULT_POLICY, PolicyVersion, VersionState

log = logging.getLogger(__name__)

_IN_MOTION = (
    3  # the current version, an incoming one, and one that drains; the rest is kept for pins
)
_LOOK_AGAIN_S = 10.0
_OF_THE_SERVER = frozenset(
    {
        "engine_refused",
        "file_unreadable",
        "not_answered",
        "too_large",
        "wrong_base_model",
        "wrong_rank",
        "wrong_verdict",
    }
)
"""Reasons that say nothing against a version that served before: the server was set up otherwise."""


@dataclass(frozen=True, slots=True)
class Swap:
    """What became of one version: seconds from its publication, and the reason if it failed."""

    version: PolicyVersion
    result: VersionState
    published_to_serving_s: float


class Swapper:
    """Follows the store: one `step` does what the planner says, `watch` repeats it."""

    def __init__(
        self,
        engine: Engine,
        routes: Routes,
        database: Database,
        writer: GroupWriter,
        folder: Path,
        expected: Expected,
        settings: Delivery,
        *,
        max_versions: int,
        on_swap: Callable[[Swap], None] = lambda _swap: None,
    ) -> None:
        self._engine = engine
        self._routes = routes
        self._database = database
        self._writer = writer
        self._folder = folder
        self._expected = expected
        self._settings = settings
        self._max_versions = max_versions
        self._on_swap = on_swap
        self._draining: dict[int, asyncio.Task[None]] = {}

    async def watch(self) -> None:
        """Follow the store until cancelled; an unreachable database or a full queue is waited for.

        Where nothing has changed there is nothing to read; only now and then, as another server's
        event may be committed behind a later one.
        """
        settled: versions.Mark | None = None
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            try:
                mark = await asyncio.to_thread(self._mark)
                if mark != settled or clock() >= due:
                    settled = None if await self.step() else mark
                    due = clock() + _LOOK_AGAIN_S
            except (StoreUnavailable, Overloaded) as error:
                log.warning("%s; trying again", error)
            await asyncio.sleep(self._settings.poll_interval_s)

    async def step(self) -> bool:
        """Carry out what the planner says now; say whether there was anything to do."""
        rows = await asyncio.to_thread(self._rows)
        self._routes.know(rows[-1].version)
        actions = plan(rows, self._routes.loaded, keep=self._max_versions - _IN_MOTION)
        for action in actions:
            await self._carry_out(action, {row.version: row for row in rows})
        return bool(actions)

    def _mark(self) -> versions.Mark:
        with reading(self._database) as connection:
            return versions.mark(connection, DEFAULT_POLICY)

    def _rows(self) -> list[PolicyVersion]:
        with reading(self._database) as connection:
            return versions.list_versions(connection, DEFAULT_POLICY)

    async def _carry_out(self, action: Action, rows: dict[int, PolicyVersion]) -> None:
        version = rows[action.version]
        match action:
            case Restore():
                await self._restore(version, rows)
            case Try():
                await self._try(version, rows)
            case Reject(reason=reason):
                await self._set_state(version, VersionState.REJECTED, reason)
            case Unload():
                self._unload_later(version)

    async def _restore(self, version: PolicyVersion, rows: dict[int, PolicyVersion]) -> None:
        """Come back on the version that was served; if it is damaged, on its nearest ancestor.

        Raises SettingsError: it is this server that does not fit. To go back for that would take
        what was learned out of service for good.
        """
        try:
            loaded = await self._load(version, rows)
        except BadPolicyVersion as error:
            is_away = not (self._folder / version.policy).is_dir()
            if error.reason in _OF_THE_SERVER or is_away:
                raise SettingsError(
                    f"version {version.version} is current, but this server cannot take it up"
                    f" ({error}); start with the settings and folders that it was served with"
                ) from None
            if version.parent is None:
                raise
            log.warning("version %d cannot be served again: %s", version.version, error)
            await self._fall_back(version, version.parent, f"at start: {error}")
            return
        self._routes.add(loaded)
        self._routes.switch(version.version)

    async def _fall_back(self, version: PolicyVersion, parent: int, reason: str) -> None:
        """Make the parent current in the transaction that takes the version back."""
        now = time.time()

        def change(connection: Connection) -> None:
            for number, state, why in (
                (parent, VersionState.CURRENT, f"version {version.version} failed {reason}"),
                (version.version, VersionState.ROLLED_BACK, reason),
            ):
                versions.set_state(connection, version.policy, number, state, at=now, reason=why)

        await self._writer.run(change)

    async def _try(self, version: PolicyVersion, rows: dict[int, PolicyVersion]) -> None:
        try:
            loaded = await self._load(version, rows)
        except BadPolicyVersion as error:
            log.warning("version %d is rejected: %s", version.version, error)
            await self._set_state(version, VersionState.REJECTED, str(error))
            self._on_swap(Swap(version, VersionState.REJECTED, time.time() - version.published_at))
            return
        try:
            await self._set_state(version, VersionState.CURRENT, "attested; delivery is direct")
        except StoreUnavailable:
            await self._unload(loaded.adapters)  # the next step tries again from the beginning
            raise
        self._routes.add(loaded)
        self._routes.switch(version.version)
        seconds = time.time() - version.published_at
        log.info("version %d is current, %.2f s after it was published", version.version, seconds)
        self._on_swap(Swap(version, VersionState.CURRENT, seconds))

    async def _load(self, version: PolicyVersion, rows: dict[int, PolicyVersion]) -> LoadedVersion:
        """Verify a version, load both adapters under new names, and attest it."""
        await self._make_room()
        name = f"{version.policy}-{version.version:06d}"
        if version.version == BASE_VERSION:
            return LoadedVersion(version, await self._engine.load_zero(f"{name}-policy"), None)
        parent = rows[version.parent] if version.parent else None
        manifest = await asyncio.to_thread(
            verify,
            self._folder,
            version,
            self._folder / parent.folder if parent else None,
            self._expected,
            self._settings,
        )
        held: list[Adapter] = []
        try:
            for role in (artifacts.POLICY, artifacts.REWARD):
                folder = self._folder / version.folder / role
                held.append(await self._engine.load(f"{name}-{role}", folder))
            loaded = LoadedVersion(version, *held)
            result = await attest(self._engine, self._expected.verdict, loaded, manifest)
            await self._set_state(version, VersionState.ATTESTED, "")
        except ThumbloopError:
            await self._unload(held)
            raise
        log.info("version %d is attested: %s", version.version, result)
        return loaded

    async def _set_state(self, version: PolicyVersion, state: VersionState, reason: str) -> None:
        if version.state is VersionState.CURRENT and state is VersionState.ATTESTED:
            return  # a restart attests again, but the version stays current
        now = time.time()

        def change(connection: Connection) -> None:
            versions.set_state(
                connection, version.policy, version.version, state, at=now, reason=reason
            )

        await self._writer.run(change)

    def _unload_later(self, version: PolicyVersion) -> None:
        """Take a version out of reach at once, and out of the engine when its requests are done."""
        loaded = self._routes.remove(version.version)
        task = asyncio.create_task(self._drain(loaded))
        self._draining[loaded.number] = task
        task.add_done_callback(lambda _done: self._draining.pop(loaded.number))

    async def _make_room(self) -> None:
        """Wait until the engine has two adapter slots free; beyond them it would evict one in use."""
        while len(self._routes.loaded) + len(self._draining) >= self._max_versions:
            await asyncio.wait(self._draining.values(), return_when=asyncio.FIRST_COMPLETED)

    async def _drain(self, loaded: LoadedVersion) -> None:
        if not await self._routes.drain(loaded.number, self._settings.drain_timeout_s):
            log.warning("version %d still answers requests; it stays loaded", loaded.number)
            await self._routes.drain(loaded.number, float("inf"))
        with suppress(EngineUnavailable):  # an engine that died has forgotten everything
            await self._unload(loaded.adapters)

    async def _unload(self, adapters: Iterable[Adapter]) -> None:
        for adapter in adapters:
            await self._engine.unload(adapter)
