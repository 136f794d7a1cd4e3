"""An engine that can be started again when it has died; everybody else holds on to this one."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path

from server.engine.protocol import REPLY_PRIORITY, Adapter, Engine, Sampled
from thumbloop.errors import EngineUnavailable
from thumbloop.rendering import Tokenizer
from thumbloop.types import Sampling

RESTARTING = "the engine is being restarted; try again in a moment"
"""What callers are told meanwhile."""


class SupervisedEngine:
    """An Engine that is not always there: without one, every call raises EngineUnavailable.

    What is said of the model is that of the first one: it is the same model each time.
    """

    tokenizer: Tokenizer
    max_model_len: int
    dtype: str
    lora_shapes: Mapping[str, tuple[int, int]]

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._engine: Engine | None = None
        self._starting: asyncio.Task[Engine] | None = None

    async def start(self) -> None:
        """Start an engine. Raises SettingsError: it cannot be."""
        self._starting = asyncio.create_task(asyncio.to_thread(self._make), name="start engine")
        engine = self._engine = await asyncio.shield(self._starting)
        self.tokenizer, self.max_model_len = engine.tokenizer, engine.max_model_len
        self.dtype, self.lora_shapes = engine.dtype, engine.lora_shapes

    async def restart(self) -> None:
        """Put away the engine, dead or alive, and start another. Raises SettingsError."""
        dead, self._engine, self._starting = self._engine, None, None
        if dead is not None:
            await asyncio.to_thread(dead.close)
        await self.start()

    async def end(self) -> None:
        """Close the engine, even when nobody waited for it: a thread that starts it cannot be stopped."""
        if self._starting is not None:
            await asyncio.wait((self._starting,))
            if self._starting.exception() is None:
                self._starting.result().close()
            self._engine = self._starting = None

    def _alive(self) -> Engine:
        if self._engine is None:
            raise EngineUnavailable(RESTARTING)
        return self._engine

    async def sample(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> Sampled:
        """Sample one response; see Engine."""
        return await self._alive().sample(prompt, sampling, adapter, priority=priority)

    def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> AsyncGenerator[Sampled, None]:
        """Sample one response, piece by piece; see Engine."""
        return self._alive().stream(prompt, sampling, adapter, priority=priority)

    async def next_logprobs(
        self,
        prompt: Sequence[int],
        token_ids: Sequence[int],
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> tuple[float, ...]:
        """Return log-probabilities of the given next tokens; see Engine."""
        return await self._alive().next_logprobs(prompt, token_ids, adapter, priority=priority)

    async def logprobs(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        adapter: Adapter | None,
        *,
        priority: int = REPLY_PRIORITY,
    ) -> tuple[float, ...]:
        """Return the log-probabilities of a continuation's tokens; see Engine."""
        return await self._alive().logprobs(prompt, continuation, adapter, priority=priority)

    async def load(self, name: str, folder: Path) -> Adapter:
        """Load an adapter; see Engine."""
        return await self._alive().load(name, folder)

    async def load_zero(self, name: str) -> Adapter:
        """Load an adapter that changes nothing; see Engine."""
        return await self._alive().load_zero(name)

    async def unload(self, adapter: Adapter) -> None:
        """Forget an adapter; see Engine."""
        await self._alive().unload(adapter)

    async def check(self) -> None:
        """Raise when the engine is dead, or not there; see Engine."""
        await self._alive().check()

    def close(self) -> None:
        """Stop the engine, if there is one; see Engine, and `end`."""
        if self._engine is not None:
            self._engine.close()
