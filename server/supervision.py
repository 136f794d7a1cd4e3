"""The engine's life after its start: follow the store while it lives, and start it again when it dies."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from server.concurrency import gather_or_cancel
from server.engine.supervised import SupervisedEngine
from server.hotswap import Swapper
from server.lifecycle import Lifecycle
from server.pipeline import Pipeline
from server.routes import Routes
from thumbloop.errors import EngineUnavailable, SettingsError

log = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 0.25
_HOUR_S = 3600.0
_MOST_DEATHS_ON_TRIAL = 1  # of one engine may be chance; of the next it is the canary


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
        self._deaths_on_trial: Counter[int] = Counter()

    async def begin(self) -> None:
        """Let calls in, once the versions that answer are loaded and the engine is warm.

        Raises SettingsError, BadPolicyVersion, EngineUnavailable, StoreUnavailable.
        """
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
        self._lifecycle.suspend("the engine is being restarted; try again in a moment")
        await self._say_serving(False)
        while True:
            self._count(death)
            log.error("%s; starting it again", death)
            blamed = self._blamed()
            await self.swapper.forget()
            try:
                await self._engine.restart()
                if blamed is not None:
                    reason = f"the engine died {self._deaths_on_trial[blamed]} times beside it"
                    await self.swapper.end_trial(blamed, reason)
                await self.begin()
            except (EngineUnavailable, SettingsError) as error:
                death = error
            else:
                break
        self._on_restart()
        await self._say_serving(True)
        log.warning("the engine was restarted")

    def _count(self, death: Exception) -> None:
        """Raise the error where there were too many of them."""
        now = time.monotonic()
        self._deaths = [*(at for at in self._deaths if now - at < _HOUR_S), now]
        if len(self._deaths) > self._max_restarts:
            raise death

    def _blamed(self) -> int | None:
        """Return the canary in whose trial the engine has died too often."""
        canary = self._routes.routed.canary
        if canary is None:
            return None
        self._deaths_on_trial[canary] += 1
        is_suspect = self._deaths_on_trial[canary] > _MOST_DEATHS_ON_TRIAL
        return canary if is_suspect else None
