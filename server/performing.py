"""The planner's actions, carried out: versions loaded, routed and unloaded, and the store told so.

A version that fails any step is rejected with the reason, and the one before goes on serving.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.canary import Canary
from server.delivery import (
    DIRECT,
    Action,
    Promote,
    Reject,
    Restore,
    Switch,
    TakeBack,
    Try,
    Unload,
    current_of,
    rollback_target,
)
from server.evidence import Look
from server.ledger import Ledger
from server.loading import Loader
from server.routes import Routes
from thumbloop.config.delivery import Delivery
from thumbloop.errors import BadPolicyVersion, SettingsError, StoreUnavailable, ThumbloopError
from thumbloop.types import BASE_VERSION, WAITING, PolicyVersion, VersionState

log = logging.getLogger(__name__)

Rows = Mapping[int, PolicyVersion]

OF_THE_SERVER = frozenset(
    {
        "attestation",
        "engine_refused",
        "file_unreadable",
        "not_answered",
        "too_large",
        "wrong_base_model",
        "wrong_rank",
        "wrong_tokenizer",
        "wrong_verdict",
    }
)
"""Reasons that say nothing against a version that served before, whose files are what they were: the server was
set up otherwise, or computes otherwise."""


@dataclass(frozen=True, slots=True)
class Swap:
    """What became of one version.

    Where it was tried: how long that took, and why it was rejected, a stable word. Where it first
    answers: seconds from its publication, and from each thumb that its round learned from.
    """

    version: PolicyVersion
    result: VersionState
    published_to_serving_s: float | None = None
    took_s: float | None = None
    reason: str = ""
    feedback_to_serving_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class View:
    """What the planner saw: all versions by number, what the trial said, whether that is old by now; and
    whether the server takes up what answered before it started.
    """

    rows: Rows
    look: Look | None
    is_old: Callable[[], bool]
    is_start: bool

    @property
    def current(self) -> int:
        """Return the number of the version that is current."""
        return current_of(list(self.rows.values())).version


class Performer:
    """Carries out one action at a time. All raise VersionConflict: the store says otherwise by now."""

    def __init__(
        self,
        loader: Loader,
        routes: Routes,
        ledger: Ledger,
        folder: Path,
        settings: Delivery,
        *,
        on_swap: Callable[[Swap], None],
    ) -> None:
        self._loader = loader
        self._routes = routes
        self._ledger = ledger
        self._folder = folder
        self._settings = settings
        self._on_swap = on_swap

    async def perform(self, action: Action, view: View) -> bool:
        """Do it, and say whether it could be done; else it has to be tried again, later.

        Raises SettingsError, BadPolicyVersion, EngineUnavailable, StoreUnavailable, Overloaded.
        """
        version = view.rows[action.version]
        match action:
            case Restore():
                return await self._restore(version, view)
            case Switch(canary=canary):
                await self._route(version.version, canary, view)
            case Try(is_canary=is_canary):
                await self._try(version, view, is_canary=is_canary)
            case Promote(reason=reason):
                await self._promote(version, reason, view)
            case TakeBack(reason=reason):
                await self._take_back(version, reason, view)
            case Reject(reason=reason):
                await self._ledger.decide(version, VersionState.REJECTED, reason)
            case Unload():
                self._loader.unload_later(version)
        return True

    async def _route(self, current: int, canary: int | None, view: View) -> None:
        """Send new requests there, unless an operator was faster."""
        group = Canary(canary, (await self._ledger.terms(canary)).share) if canary else None
        if not view.is_old():
            self._routes.switch(current, group)

    async def _restore(self, version: PolicyVersion, view: View) -> bool:
        """Take up a version that answers, as the store says.

        At a start one that is damaged is taken back, and its nearest ancestor answers. Raises
        SettingsError: it is this server that does not fit. To go back for that would take what was
        learned out of service for good. A server that runs goes on with what it has; False then.
        """
        try:
            loaded = await self._loader.load(version, view.rows)
        except BadPolicyVersion as error:
            if not view.is_start:
                log.warning("version %d cannot be taken up here: %s", version.version, error)
                return False
            self._blame(version, error)
            if version.parent is None:
                raise
            log.warning("version %d cannot be served again: %s", version.version, error)
            await self._fall_back(version, view, f"at start: {error}")
            return True
        self._routes.add(loaded)
        is_canary = version.state is VersionState.CANARY
        await self._route(view.current, version.version if is_canary else None, view)
        return True

    def _blame(self, version: PolicyVersion, error: BadPolicyVersion) -> None:
        """Raise SettingsError where the fault is not the version's."""
        is_away = not (self._folder / version.policy).is_dir()
        if error.reason in OF_THE_SERVER or is_away:
            raise SettingsError(
                f"version {version.version} is {version.state}, but this server cannot take it up"
                f" ({error}); start with the settings and folders that it was served with"
            ) from None

    async def _fall_back(self, version: PolicyVersion, view: View, reason: str) -> None:
        """Take a damaged version back, in the transaction that lets another answer: of a canary the current
        version, of the current version what a rollback leads to, else the base model."""
        if version.state is VersionState.CANARY:
            await self._ledger.end_trial(version.version, expected=view.current, reason=reason)
            return
        target = rollback_target(list(view.rows.values()))
        await self._ledger.make_current(
            target.version if target else BASE_VERSION,
            expected=version.version,
            leaves_as=VersionState.ROLLED_BACK,
            reason=reason,
        )

    async def _try(self, version: PolicyVersion, view: View, *, is_canary: bool) -> None:
        began = time.perf_counter()
        try:
            loaded = await self._loader.load(version, view.rows)
        except BadPolicyVersion as error:
            log.warning("version %d is rejected: %s", version.version, error)
            await self._ledger.decide(version, VersionState.REJECTED, str(error))
            took_s = time.perf_counter() - began
            self._on_swap(Swap(version, VersionState.REJECTED, took_s=took_s, reason=error.reason))
            return
        try:
            await self._ledger.decide(version, VersionState.ATTESTED, "")
            if is_canary:
                await self._ledger.begin_trial(
                    version, self._settings.canary, expected=view.current
                )
            else:
                await self._ledger.make_current(
                    version.version,
                    expected=view.current,
                    leaves_as=VersionState.RETIRED,
                    reason=DIRECT,
                    was=WAITING,
                )
        except ThumbloopError:
            self._loader.give_up(loaded)  # the next step says what becomes of it
            raise
        self._routes.add(loaded)
        if is_canary:
            await self._route(view.current, version.version, view)
        else:
            await self._route(version.version, None, view)
        result = VersionState.CANARY if is_canary else VersionState.CURRENT
        now, took_s = time.time(), time.perf_counter() - began
        seconds = now - version.published_at
        log.info(
            "version %d is %s, %.2f s after it was published", version.version, result, seconds
        )
        waits = tuple(now - at for at in await self._given_at(version))
        self._on_swap(Swap(version, result, seconds, took_s, feedback_to_serving_s=waits))

    async def _given_at(self, version: PolicyVersion) -> list[float]:
        """Return when the thumbs were given that a version learned from; none where the store is away."""
        try:
            return await self._ledger.given_at(version)
        except StoreUnavailable as error:
            log.warning("how long feedback took to serve is not known: %s", error)
            return []

    async def _promote(self, version: PolicyVersion, reason: str, view: View) -> None:
        """Make the canary current in the place of the one that is."""
        await self._ledger.make_current(
            version.version,
            expected=view.current,
            leaves_as=VersionState.RETIRED,
            reason=reason,
            was=(VersionState.CANARY,),
            evidence=view.look.evidence if view.look else None,
        )
        await self._route(version.version, None, view)
        log.info("version %d is promoted: %s", version.version, reason)
        self._on_swap(Swap(version, VersionState.CURRENT))

    async def _take_back(self, version: PolicyVersion, reason: str, view: View) -> None:
        """End the canary's trial, which gets no requests any more."""
        await self._ledger.end_trial(
            version.version,
            expected=view.current,
            reason=reason,
            evidence=view.look.evidence if view.look else None,
        )
        log.warning("version %d is taken back: %s", version.version, reason)
        self._on_swap(Swap(version, VersionState.ROLLED_BACK))
