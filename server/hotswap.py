"""store -> planner -> engine, again and again; and operators' moves between."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from server.concurrency import end_all
from server.delivery import Action, Move, canary_of, current_of, destination, is_beside, plan
from server.engine.supervised import RESTARTING
from server.evidence import Look, Observer
from server.ledger import Ledger
from server.loading import Loader
from server.performing import Performer, Swap, View
from server.routes import Routes
from thumbloop.config.delivery import Delivery
from thumbloop.errors import EngineUnavailable, Overloaded, StoreUnavailable, VersionConflict
from thumbloop.store import versions
from thumbloop.types import WAITING, PolicyVersion, VersionState

log = logging.getLogger(__name__)

_IN_MOTION = 3  # the current version, a canary or incoming one, and one that drains; the rest is kept for pins
_LOOK_AGAIN_S = 10.0
_MOVE_PATIENCE_S = 30.0
_START_AGAIN_S = 0.2
_SERVED = (VersionState.RETIRED, VersionState.CANARY, VersionState.CURRENT)
_RESTS_PER_LOOK = 20  # a look at a trial takes at most this part of the time,
_LONGEST_REST_S = 30.0  # as long as that is soon enough


class Swapper:
    """Follows the store: one `step` does what the planner says, `watch` repeats it."""

    def __init__(
        self,
        loader: Loader,
        routes: Routes,
        ledger: Ledger,
        folder: Path,
        settings: Delivery,
        *,
        max_versions: int,
        on_swap: Callable[[Swap], None] = lambda _swap: None,
    ) -> None:
        self._loader = loader
        self._routes = routes
        self._ledger = ledger
        self._observer = Observer(ledger)
        self._performer = Performer(loader, routes, ledger, folder, settings, on_swap=on_swap)
        self._settings = settings
        self._keep = max_versions - _IN_MOTION
        self._loading = asyncio.Lock()
        self._on_swap = on_swap
        self._moving: set[asyncio.Task[PolicyVersion]] = set()
        self._pointing = 0  # moves that are being written
        self._moves = 0  # their beginnings and ends
        self._is_settled = False
        self._has_started = False
        self._is_away = False  # the engine, or what it should hold
        self._fetching: asyncio.Task[None] | None = None
        self.latest_look: Look | None = None
        """What the running trial said last, None while there is none."""

    async def start(self) -> None:
        """Take up what answered before: the current version, and the canary if there was one.

        Raises SettingsError, BadPolicyVersion, EngineUnavailable, StoreUnavailable.
        """
        while not self._is_restored(await self._ledger.rows()):
            if not await self.step():
                await asyncio.sleep(_START_AGAIN_S)
        self._is_away = False

    async def forget(self) -> None:
        """Forget what the engine held, as it died; `start` takes up what answers anew."""
        self._is_away, self._has_started = True, False
        if self._fetching is not None:  # it might wait for ever for an answer of the dead
            self._fetching.cancel()
        async with self._loading:
            self._routes.clear()
            await self._loader.forget()

    async def blame(self, number: int, reason: str) -> None:
        """Take a version out that the engine died of: of trial, or of waiting. Raises StoreUnavailable."""
        rows = {row.version: row for row in await self._ledger.rows()}
        version, current = rows[number], current_of(list(rows.values()))
        with suppress(VersionConflict):
            if version.state is VersionState.CANARY:
                await self._ledger.end_trial(number, expected=current.version, reason=reason)
                self._on_swap(Swap(version, VersionState.ROLLED_BACK))
            elif version.state in WAITING:
                await self._ledger.decide(version, VersionState.REJECTED, reason)
                self._on_swap(Swap(version, VersionState.REJECTED))

    def suspect(self) -> int | None:
        """Return the version that the engine may have died of: the one that is loaded, or else the canary."""
        return self._loader.loading or self._routes.routed.canary

    def _is_restored(self, rows: list[PolicyVersion]) -> bool:
        current, canary = current_of(rows), canary_of(rows)
        routed = self._routes.routed
        return routed == (current.version, canary.version if canary else None)

    async def watch(self) -> None:
        """Follow the store until cancelled; an unreachable database or a full queue is waited for.

        Where nothing has changed there is nothing to read; only now and then, as another server's
        event may be committed behind a later one, and while a trial runs.
        """
        seen: versions.Mark | None = None
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            try:
                mark = await self._ledger.mark()
                if mark != seen or not self._is_settled or clock() >= due:
                    self._is_settled = True
                    seen = None if await self.step() else mark
                    due = clock() + self._rest_s()
            except (StoreUnavailable, Overloaded) as error:
                self._is_settled = False
                log.warning("%s; trying again", error)
            await asyncio.sleep(self._settings.poll_interval_s)

    def _rest_s(self) -> float:
        """Return how long to rest where nothing changes but what users say of a canary."""
        if self.latest_look is None:
            return _LOOK_AGAIN_S
        rest_s = min(_RESTS_PER_LOOK * self.latest_look.took_s, _LONGEST_REST_S)
        return max(self._settings.canary.look_interval_s, rest_s)

    async def step(self) -> bool:
        """Carry out what the planner says now; say whether there was anything to do."""
        async with self._loading:
            if self._pointing:
                return True  # what would be read is about to change
            moves = self._moves
            rows = {row.version: row for row in await self._ledger.rows()}
            self._routes.know(max(rows))
            self._has_started = self._has_started or self._is_restored(list(rows.values()))
            self.latest_look = await self._look(list(rows.values()))
            actions = plan(
                list(rows.values()),
                self._routes.loaded,
                routed=self._routes.routed,
                keep=self._keep,
                has_trials=self._settings.mode == "canary",
                ruling=self.latest_look.ruling if self.latest_look else None,
            )
            view = View(
                rows,
                self.latest_look,
                is_old=lambda: moves != self._moves,
                is_start=not self._has_started,
            )
            return await self._carry_out(actions, view)

    async def _carry_out(self, actions: list[Action], view: View) -> bool:
        """Do one after the other; say whether the planner should be asked again at once."""
        has_changed = False
        try:
            for action in actions:
                if view.is_old():
                    return True  # an operator moved the pointer
                has_changed |= await self._performer.perform(action, view)
        except VersionConflict as error:  # another server was first
            log.warning("%s; looking again", error)
            return True
        return has_changed

    async def _look(self, rows: list[PolicyVersion]) -> Look | None:
        """Look at the trial that runs, if one does."""
        canary, current = canary_of(rows), current_of(rows)
        if canary is None or not is_beside(rows, canary, current):
            return None
        terms = await self._ledger.terms(canary.version)
        return await self._observer.look(canary, current, terms)

    async def move(self, move: Move) -> PolicyVersion:
        """Make another version current, because an operator says so; return it.

        One that is loaded answers at once, whatever is being loaded meanwhile. Another is loaded and
        attested first: nothing has changed where that fails. While the engine is away it is written only:
        it may have died of the version that is left. Whoever asked may leave: it is done all the same.
        Raises what destination() raises, BadPolicyVersion, EngineUnavailable, StoreUnavailable,
        Overloaded.
        """
        moving = asyncio.create_task(self._move(move))
        self._moving.add(moving)
        moving.add_done_callback(self._moved)
        return await asyncio.shield(moving)

    def _moved(self, moving: asyncio.Task[PolicyVersion]) -> None:
        self._moving.discard(moving)
        if not moving.cancelled() and (error := moving.exception()) is not None:
            log.warning("a move came to nothing: %s", error)

    async def finish_moves(self) -> None:
        """Wait for the moves that are under way, for a while."""
        if self._moving:
            await asyncio.wait(self._moving, timeout=_MOVE_PATIENCE_S)
            await end_all([*self._moving])

    async def _move(self, move: Move) -> PolicyVersion:
        to = destination(await self._ledger.rows(), move)
        if self._is_away:
            if to.state not in _SERVED:
                raise EngineUnavailable(
                    f"version {to.version} has to be checked first, and the engine is being restarted"
                )
            return await self._point(move)
        if to.version in self._routes.loaded or await self._take_back(to):
            return await self._point(move)
        async with self._loading:
            if self._is_away:  # it died while another was loaded
                raise EngineUnavailable(RESTARTING)
            self._is_settled = False
            self._fetching = asyncio.ensure_future(self._fetch(move))
            try:
                await self._fetching
            except asyncio.CancelledError:
                if not self._is_away:
                    raise
                raise EngineUnavailable("the engine died meanwhile; try again") from None
            finally:
                self._fetching = None
            return await self._point(move)

    async def _take_back(self, version: PolicyVersion) -> bool:
        """Let a version that drains answer again, as it is; say whether it does."""
        loaded = await self._loader.take_back(version.version)
        if loaded is not None:
            self._routes.add(loaded)
        return loaded is not None

    async def _fetch(self, move: Move) -> None:
        """Take up the version that a move leads to, unless it is loaded by now."""
        rows = await self._ledger.rows()
        to = destination(rows, move)
        if to.version not in self._routes.loaded:
            self._routes.add(await self._loader.load(to, {row.version: row for row in rows}))

    async def _point(self, move: Move) -> PolicyVersion:
        """Write what a move changes and send all new requests there; a trial beside another is over.

        No plan is carried out meanwhile: it might unload what the move leads to.
        """
        self._moves += 1
        self._pointing += 1
        try:
            look = self.latest_look
            moved = await self._ledger.move(move, {look.version: look.evidence} if look else {})
            if moved.version in self._routes.loaded:  # else the engine died meanwhile
                self._routes.switch(moved.version)
        finally:
            self._pointing -= 1
            self._moves += 1
            self._is_settled = False
        log.info("version %d is current: %s", moved.version, move.why)
        if moved.version != move.expected:  # else a canary was taken back, no more
            self._on_swap(Swap(moved, VersionState.CURRENT))
        return moved
