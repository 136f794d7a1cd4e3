"""Starting, serving, draining: who may come in, and when the last one has left."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from server.pipeline import Pipeline
from thumbloop.errors import Draining, EngineUnavailable, Overloaded

_RETRY_AFTER_S = 0.5


class Phase(Enum):
    """Where the server is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Lifecycle:
    """Lets calls for replies in once there is a pipeline, up to a limit, until draining begins."""

    def __init__(self, max_in_flight: int) -> None:
        self.phase = Phase.STARTING
        self.in_flight = 0
        self._max_in_flight = max_in_flight
        self._pipeline: Pipeline | None = None
        self._why_not = "the server is starting; try again in a moment"
        self._empty = asyncio.Event()
        self._empty.set()

    def serve(self, pipeline: Pipeline) -> None:
        """Open the doors."""
        self._pipeline = pipeline
        if self.phase is not Phase.DRAINING:
            self.phase = Phase.SERVING

    def suspend(self, why: str) -> None:
        """Close the doors until `serve` is called again; those inside are not waited for."""
        self._pipeline, self._why_not = None, why
        if self.phase is not Phase.DRAINING:
            self.phase = Phase.STARTING

    @contextmanager
    def admit(self) -> Iterator[Pipeline]:
        """Let one call in. Raises EngineUnavailable, Draining, Overloaded."""
        if self.phase is Phase.DRAINING:
            raise Draining("the server is shutting down; try another one")
        if self._pipeline is None:
            raise EngineUnavailable(self._why_not)
        if self.in_flight >= self._max_in_flight:
            raise Overloaded(
                f"{self.in_flight} requests are in flight, the limit; try again",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.in_flight += 1
        self._empty.clear()
        try:
            yield self._pipeline
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._empty.set()

    async def drain(self, grace_s: float) -> bool:
        """Close the doors and wait for those inside; say whether all left in time."""
        self.phase = Phase.DRAINING
        try:
            await asyncio.wait_for(self._empty.wait(), grace_s)
        except TimeoutError:
            return False
        return True
