"""Versions into the engine and out of it: verify, load, attest; drain, unload.

Adapters come under new names, ids and paths: nothing is ever reloaded in place.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from server.attestation import attest
from server.concurrency import end_all
from server.engine import Adapter, Engine
from server.routes import LoadedVersion, Routes
from server.verification import Expected, find_folder, verify
from thumbloop import artifacts
from thumbloop.config.delivery import Delivery
from thumbloop.errors import EngineUnavailable, Overloaded, ThumbloopError
from thumbloop.leases import Lease, hold
from thumbloop.types import BASE_VERSION, WAITING, PolicyVersion

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 0.5


@dataclass(slots=True)
class _Draining:
    """A version that answers no new request. `is_leaving`: its adapters are being unloaded."""

    loaded: LoadedVersion
    task: asyncio.Task[None]
    is_leaving: bool = False


class Loader:
    """One engine with room for so many versions; those in `routes`, and those that drain."""

    def __init__(
        self,
        engine: Engine,
        routes: Routes,
        folder: Path,
        expected: Expected,
        settings: Delivery,
        *,
        max_versions: int,
    ) -> None:
        self._engine = engine
        self._routes = routes
        self._folder = folder
        self._expected = expected
        self._settings = settings
        self._max_versions = max_versions
        self._draining: dict[int, _Draining] = {}
        self._leases: dict[int, Lease] = {}
        self.loading: int | None = None
        """The version that is being loaded and attested."""

    @property
    def held(self) -> frozenset[int]:
        """Return the numbers of the versions whose folders are in use: being loaded, loaded, or draining."""
        return frozenset(self._leases)

    async def load(
        self, version: PolicyVersion, rows: Mapping[int, PolicyVersion]
    ) -> LoadedVersion:
        """Verify a version, load both adapters under new names, and attest it; one that is there still is taken as it is.

        Raises BadPolicyVersion, EngineUnavailable, Overloaded: nothing is loaded then.
        """
        if (held := self._routes.find(version.version)) is not None:
            return held  # an operator's move loaded it, and could not be written
        if (taken_back := await self.take_back(version.version)) is not None:
            return taken_back
        await self._make_room()
        name = f"{version.policy}-{version.version:06d}"
        if version.version == BASE_VERSION:
            return LoadedVersion(version, await self._engine.load_zero(f"{name}-policy"), None)
        folder = find_folder(self._folder, version)
        assert version.version not in self._leases, "nothing is loaded twice"
        self._leases[version.version] = await _hold(folder)
        self.loading = version.version
        try:
            return await self._load(name, folder, version, rows)
        except (EngineUnavailable, asyncio.CancelledError):
            self._release(version.version)
            raise  # it stays the one that was loaded: whoever asks why the engine died hears of it
        except BaseException:
            self.loading = None
            self._release(version.version)
            raise

    async def _load(
        self, name: str, folder: Path, version: PolicyVersion, rows: Mapping[int, PolicyVersion]
    ) -> LoadedVersion:
        """Verify, load and attest a version whose folder is held."""
        parent = rows[version.parent] if version.parent and version.state in WAITING else None
        manifest = await asyncio.to_thread(
            verify, self._folder, version, parent, self._expected, self._settings
        )
        held: list[Adapter] = []
        try:
            for role in (artifacts.POLICY, artifacts.REWARD):
                adapter = await self._engine.load(f"{name}-{role}", folder / role)
                held.append(adapter)
            loaded = LoadedVersion(version, *held)
            result = await attest(self._engine, self._expected.verdict, loaded, manifest)
        except ThumbloopError:
            await self._unload(held)
            raise
        log.info("version %d is attested: %s", version.version, result)
        self.loading = None
        return loaded

    async def take_back(self, number: int) -> LoadedVersion | None:
        """Return a version that drains, which it no longer does; None: it does not, or not any more."""
        if (draining := self._draining.get(number)) is None:
            return None
        if draining.is_leaving:
            await asyncio.wait((draining.task,))
            return None
        draining.task.cancel()
        await asyncio.wait((draining.task,))
        return draining.loaded

    def _release(self, number: int) -> None:
        if (lease := self._leases.pop(number, None)) is not None:  # the base model has none
            lease.close()

    def unload_later(self, version: PolicyVersion) -> None:
        """Take a version out of reach at once, and out of the engine when its requests are done."""
        self._drain_later(self._routes.remove(version.version))

    def give_up(self, loaded: LoadedVersion) -> None:
        """Let go of a version that was loaded for nothing, unless it is within reach of requests: the planner
        says then what becomes of it.
        """
        if self._routes.find(loaded.number) is None:
            self._drain_later(loaded)

    def _drain_later(self, loaded: LoadedVersion) -> None:
        task = asyncio.create_task(self._drain(loaded))
        self._draining[loaded.number] = _Draining(loaded, task)
        task.add_done_callback(lambda _done: self._draining.pop(loaded.number))

    async def forget(self) -> None:
        """Forget what was loaded and what drains: the engine that held it is gone."""
        await end_all([draining.task for draining in self._draining.values()])
        for number in [*self._leases]:
            self._release(number)
        self.loading = None

    async def _make_room(self) -> None:
        """Wait until the engine has two adapter slots free; beyond them it would evict one in use."""
        while len(self._routes.loaded) + len(self._draining) >= self._max_versions:
            if not self._draining:  # operators moved faster than the planner unloads
                raise Overloaded("the engine has no room; try again", retry_after_s=_RETRY_AFTER_S)
            tasks = [draining.task for draining in self._draining.values()]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    async def _drain(self, loaded: LoadedVersion) -> None:
        if not await self._routes.drain(loaded.number, self._settings.drain_timeout_s):
            log.warning("version %d still answers requests; it stays loaded", loaded.number)
            await self._routes.drain(loaded.number, float("inf"))
        self._draining[loaded.number].is_leaving = True
        with suppress(EngineUnavailable):  # an engine that died has forgotten everything
            await self.unload(loaded)

    async def unload(self, loaded: LoadedVersion) -> None:
        """Take a version out of the engine that no request uses, and let its folder go."""
        try:
            await self._unload(loaded.adapters)
        finally:
            self._release(loaded.number)

    async def _unload(self, adapters: Iterable[Adapter]) -> None:
        for adapter in adapters:
            await self._engine.unload(adapter)


async def _hold(folder: Path) -> Lease:
    """Hold a folder; whoever is cancelled meanwhile leaves no lock behind."""
    holding = asyncio.ensure_future(asyncio.to_thread(hold, folder))
    try:
        return await asyncio.shield(holding)
    except asyncio.CancelledError:
        holding.add_done_callback(_let_go)
        raise


def _let_go(held: "asyncio.Future[Lease]") -> None:
    if not held.cancelled() and held.exception() is None:
        held.result().close()
