"""The engine's life after its start: follow the store while it lives, and start it again when it dies."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from server.concurrency import gather_or_cancel, under_way
from server.engine.supervised import RESTARTING, SupervisedEngine
from server.hotswap import Swapper
from server.lifecycle import Lifecycle
from server.pipeline import Pipeline
from server.routes import Routes
from thumbloop.errors import EngineUnavailable, Overloaded, SettingsError, StoreUnavailable

log = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 0.25
_HOUR_S = 3600.0
_MOST_DEATHS = 1  # in an hour: of one engine may be chance; of the next it is the version
_STORE_PATIENCE_S = 0.5


class Supervisor:
    """Lets calls in while there is an engine that holds the versions which answer."""

    def __init__(
        self,
        engine: SupervisedEngine,
        swapper: Swapper,
        routes: Routes,
        lifecycle: Lifecycle,
        pipeline: Pipeline,
        *,
        max_restarts_per_hour: int,
        say_serving: Callable[[bool], Awaitable[None]],
        on_restart: Callable[[], None],
    ) -> None:
        self._engine = engine
        self.swapper = swapper
        self._routes = routes
        self._lifecycle = lifecycle
        self._pipeline = pipeline
        self._max_restarts = max_restarts_per_hour
        self._say_serving = say_serving
        self._on_restart = on_restart
        self._deaths: list[float] = []
        self._suspected: list[tuple[float, int]] = []

    async def start(self) -> None:
        """Let calls in, once the versions that answer are loaded and the engine is warm; where it dies of that,
        another one takes its place, as later.

        Raises SettingsError, BadPolicyVersion, StoreUnavailable; EngineUnavailable: it died too often.
        """
        try:
            await self._begin_while_it_lives()
        except EngineUnavailable as error:
            await self._recover(error)

    async def _begin(self) -> None:
        await self.swapper.start()
        await self._warm_up()
        self._lifecycle.serve(self._pipeline)

    async def _warm_up(self) -> None:
        """Answer once for nobody: the first pass through an engine is slow."""
        some_token = self._engine.tokenizer.encode("a", add_special_tokens=False)
        with self._routes.hold() as version:
            await self._engine.next_logprobs(some_token, some_token[:1], version.policy)

    async def run(self) -> None:
        """Follow the store until cancelled. Raises what ended it; EngineUnavailable: it died too often."""
        while True:
            try:
                await gather_or_cancel((self.swapper.watch(), self._watch_engine()))
            except EngineUnavailable as error:
                await self._revive(error)

    async def _watch_engine(self) -> None:
        """Raise EngineUnavailable when the engine dies."""
        while True:
            await self._engine.check()
            await asyncio.sleep(_CHECK_INTERVAL_S)

    async def _revive(self, death: Exception) -> None:
        """Turn calls away until another engine serves what the store says is served."""
        self._lifecycle.suspend(RESTARTING)
        await self._say_serving(False)
        await self._recover(death)
        await self._say_serving(True)

    async def _recover(self, death: Exception) -> None:
        """Start engines until one lives on with the versions that answer."""
        blamed = self._mourn(death)
        await self.swapper.forget()
        needs_engine = True
        while True:
            try:
                if needs_engine:
                    await self._engine.restart()
                needs_engine = False
                for version in blamed:
                    reason = f"the engine died {self._deaths_of(version)} times beside it"
                    await self.swapper.blame(version, reason)
                await self._begin_while_it_lives()
                break
            except (EngineUnavailable, SettingsError) as error:
                blamed |= self._mourn(error)
                await self.swapper.forget()
                needs_engine = True
            except (StoreUnavailable, Overloaded) as error:
                log.warning("%s; trying again", error)
                await asyncio.sleep(_STORE_PATIENCE_S)
        self._on_restart()
        log.warning("the engine was restarted")

    async def _begin_while_it_lives(self) -> None:
        """Begin, unless the engine dies again: it may leave calls without an answer."""
        async with (
            under_way(self._begin()) as beginning,
            under_way(self._watch_engine()) as watching,
        ):
            await asyncio.wait((beginning, watching), return_when=asyncio.FIRST_COMPLETED)
            await (beginning if beginning.done() else watching)

    def _mourn(self, death: Exception) -> set[int]:
        """Count a death; return the versions that the engine has died of too often.

        Raises the error where it has died too often altogether.
        """
        now = time.monotonic()
        self._deaths = [*(at for at in self._deaths if now - at < _HOUR_S), now]
        if len(self._deaths) > self._max_restarts:
            raise death
        log.error("%s; starting it again", death)
        if (suspect := self.swapper.suspect()) is None:
            return set()
        self._suspected = [*(s for s in self._suspected if now - s[0] < _HOUR_S), (now, suspect)]
        return {suspect} if self._deaths_of(suspect) > _MOST_DEATHS else set()

    def _deaths_of(self, version: int) -> int:
        """Return how often in an hour the engine died while a version was loaded or on trial."""
        return sum(suspect == version for _, suspect in self._suspected)
