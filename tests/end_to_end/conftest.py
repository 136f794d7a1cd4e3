"""vLLM engines on the CPU for the whole run: each takes a quarter of a minute to start.

Tests that use one share its event loop: `pytestmark = pytest.mark.asyncio(loop_scope="session")`.
"""

import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from server.engine import Engine
from tests.publishing import Publisher, RealSpeaker
from tests.serving import Running, running
from thumbloop.config import State, Verdict
from thumbloop.config.server import EngineSettings
from thumbloop.rendering import VerdictTokens, verdict_tokens

SETTINGS = EngineSettings(
    dtype="float32", max_model_len=256, max_num_seqs=32, kv_cache_gib=0.25, max_rank=4
)


@contextmanager
def started(model: Path, **changes: Any) -> Iterator[Engine]:
    """Start an engine, and stop it afterwards; `changes` are settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what vllm's imports and its start have to say of torch
        from server.engine.vllm_engine import VllmEngine

        engine = VllmEngine(model, SETTINGS.model_copy(update=changes), seed=0)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="session")
def vllm_engine(tiny_model: Path) -> Iterator[Engine]:
    """Adapters are merged: float32, and copies for all slots of so small a model fit."""
    with started(tiny_model) as engine:
        yield engine


@pytest.fixture(scope="session")
def grouped_engine(tiny_model: Path) -> Iterator[Engine]:
    """Grouped LoRA, as larger models have it: no room to merge."""
    with started(tiny_model, merged_gib=0.0) as engine:
        yield engine


@pytest.fixture(scope="session")
def bfloat16_engine(tiny_model: Path) -> Iterator[Engine]:
    """Grouped LoRA over packed matrices: what is merged in float32 is not in bfloat16."""
    with started(tiny_model, dtype="bfloat16") as engine:
        yield engine


@pytest.fixture(scope="module")
def stock_engine(tiny_model: Path) -> Iterator[Engine]:
    """vLLM's own operators."""
    with started(tiny_model, grouped_lora=False) as engine:
        yield engine


class Borrowed:
    """The run's engine for one server: what the server leaves in it is taken out, it stays open."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.held: dict[int, Any] = {}
        self.most_held = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def load(self, name: str, folder: Path) -> Any:
        return self._hold(await self._engine.load(name, folder))

    async def load_zero(self, name: str) -> Any:
        return self._hold(await self._engine.load_zero(name))

    async def unload(self, adapter: Any) -> None:
        del self.held[adapter.number]
        await self._engine.unload(adapter)

    def close(self) -> None:
        """Leave the engine running."""

    def _hold(self, adapter: Any) -> Any:
        self.held[adapter.number] = adapter
        self.most_held = max(self.most_held, len(self.held))
        return adapter


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(folder=tmp_path / "state")


Lend = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def lend(vllm_engine: Engine, tiny_model: Path, state: State) -> Lend:
    """Return what starts a server on the run's engine; its arguments are settings."""

    @asynccontextmanager
    async def lent(**sections: Any) -> AsyncIterator[Running]:
        borrowed = Borrowed(vllm_engine)
        async with running(
            tiny_model,
            state,
            make_engine=lambda _model, _config: borrowed,
            engine={"max_rank": 4},
            **sections,
        ) as server:
            yield server
        for adapter in [*borrowed.held.values()]:
            await borrowed.unload(adapter)

    return lent


@pytest_asyncio.fixture(loop_scope="session")
async def server(lend: Lend) -> AsyncIterator[Running]:
    async with lend() as server:
        yield server


@pytest.fixture
def verdict(server: Running) -> VerdictTokens:
    return verdict_tokens(Verdict(), server.engine.tokenizer)


@pytest.fixture
def speaker(tiny_model: Path) -> RealSpeaker:
    return RealSpeaker(tiny_model)


@pytest.fixture
def publisher(
    server: Running, tiny_model: Path, state: State, verdict: VerdictTokens, speaker: RealSpeaker
) -> Publisher:
    return Publisher(tiny_model, state.versions, server.database, verdict, speaker)
