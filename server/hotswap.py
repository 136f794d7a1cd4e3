"""Versions -> engine: load, attest, route, unload, as the planner or an operator says.

Every step writes to the store what became of the version; a version that fails any of them is
rejected with the reason, and the one before goes on serving.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from server.delivery import (
    Action,
    Move,
    Reject,
    Restore,
    Switch,
    Try,
    Unload,
    destination,
    plan,
)
from server.loading import Loader
from server.routes import Routes
from thumbloop.config.server import Delivery
from thumbloop.errors import (
    BadPolicyVersion,
    Overloaded,
    SettingsError,
    StoreUnavailable,
    VersionConflict,
)
from thumbloop.store import GroupWriter, reading, versions
from thumbloop.types import DEFAULT_POLICY, PolicyVersion, VersionState

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
        loader: Loader,
        routes: Routes,
        database: Database,
        writer: GroupWriter,
        folder: Path,
        settings: Delivery,
        *,
        max_versions: int,
        on_swap: Callable[[Swap], None] = lambda _swap: None,
    ) -> None:
        self._loader = loader
        self._routes = routes
        self._database = database
        self._writer = writer
        self._folder = folder
        self._settings = settings
        self._keep = max_versions - _IN_MOTION
        self._on_swap = on_swap
        self._loading = asyncio.Lock()

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
        async with self._loading:
            rows = await asyncio.to_thread(self._rows)
            self._routes.know(rows[-1].version)
            actions = plan(
                rows,
                self._routes.loaded,
                routed=self._routes.routed,
                keep=self._keep,
            )
            for action in actions:
                await self._carry_out(action, {row.version: row for row in rows})
            return bool(actions)

    async def move(self, move: Move) -> PolicyVersion:
        """Make another version current, because an operator says so; return it.

        One that is loaded answers at once, whatever is being loaded meanwhile. Another is loaded and
        attested first: nothing has changed where that fails. Raises what destination() raises,
        BadPolicyVersion, EngineUnavailable, StoreUnavailable, Overloaded.
        """
        to = destination(await asyncio.to_thread(self._rows), move)
        if to.version in self._routes.loaded:
            return await self._point(move)
        async with self._loading:
            await self._fetch(move)
            return await self._point(move)

    async def _fetch(self, move: Move) -> None:
        """Take up the version that a move leads to, unless it is loaded by now."""
        rows = await asyncio.to_thread(self._rows)
        to = destination(rows, move)
        if to.version not in self._routes.loaded:
            self._routes.add(await self._loader.load(to, {row.version: row for row in rows}))

    async def _point(self, move: Move) -> PolicyVersion:
        """Write what a move changes and send new requests there."""
        now = time.time()

        def change(connection: Connection) -> PolicyVersion:
            # Another server may have changed what the operator saw.
            to = destination(versions.list_versions(connection, DEFAULT_POLICY), move)
            versions.make_current(
                connection,
                to.policy,
                to.version,
                expected=move.expected,
                leaves_as=move.leaves_as,
                at=now,
                reason=move.reason or ("rolled back" if move.is_rollback else "promoted"),
                actor=move.actor or "operator",
            )
            moved = versions.get(connection, to.policy, to.version)
            assert moved is not None
            return moved

        moved = await self._writer.run(change)
        if moved.version in self._routes.loaded:  # else the next step takes it up
            self._routes.switch(moved.version)
        log.info("version %d is current: %s", moved.version, moved.reason)
        return moved

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
            case Switch():
                self._routes.switch(version.version)
            case Try():
                await self._try(version, rows)
            case Reject(reason=reason):
                await self._set_state(version, VersionState.REJECTED, reason)
            case Unload():
                self._loader.unload_later(version)

    async def _restore(self, version: PolicyVersion, rows: dict[int, PolicyVersion]) -> None:
        """Come back on the version that was served; if it is damaged, on its nearest ancestor.

        Raises SettingsError: it is this server that does not fit. To go back for that would take
        what was learned out of service for good.
        """
        try:
            loaded = await self._loader.load(version, rows)
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
            versions.make_current(
                connection,
                version.policy,
                parent,
                expected=version.version,
                leaves_as=VersionState.ROLLED_BACK,
                at=now,
                reason=reason,
            )

        await self._writer.run(change)

    async def _try(self, version: PolicyVersion, rows: dict[int, PolicyVersion]) -> None:
        try:
            loaded = await self._loader.load(version, rows)
        except BadPolicyVersion as error:
            log.warning("version %d is rejected: %s", version.version, error)
            await self._set_state(version, VersionState.REJECTED, str(error))
            self._on_swap(Swap(version, VersionState.REJECTED, time.time() - version.published_at))
            return
        try:
            await self._set_state(version, VersionState.ATTESTED, "")
            await self._promote(version)
        except VersionConflict as error:
            log.warning("version %d came too late: %s", version.version, error)
            await self._loader.unload(loaded.adapters)  # the next step says what becomes of it
            return
        except StoreUnavailable:
            await self._loader.unload(
                loaded.adapters
            )  # the next step tries again from the beginning
            raise
        self._routes.add(loaded)
        self._routes.switch(version.version)
        seconds = time.time() - version.published_at
        log.info("version %d is current, %.2f s after it was published", version.version, seconds)
        self._on_swap(Swap(version, VersionState.CURRENT, seconds))

    async def _promote(self, version: PolicyVersion) -> None:
        """Make a version current in its parent's place. Raises VersionConflict, StoreUnavailable."""
        now, parent = time.time(), version.parent
        assert parent is not None, "the base model is never tried"

        def change(connection: Connection) -> None:
            versions.make_current(
                connection,
                version.policy,
                version.version,
                expected=parent,
                leaves_as=VersionState.RETIRED,
                at=now,
                reason="attested; delivery is direct",
            )

        await self._writer.run(change)

    async def _set_state(self, version: PolicyVersion, state: VersionState, reason: str) -> None:
        now = time.time()

        def change(connection: Connection) -> None:
            versions.set_state(
                connection, version.policy, version.version, state, at=now, reason=reason
            )

        await self._writer.run(change)
