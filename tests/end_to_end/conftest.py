"""One vLLM engine on the CPU for the whole run: it takes half a minute to start.

Tests that use it share its event loop: `pytestmark = pytest.mark.asyncio(loop_scope="session")`.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.engine import Engine
from thumbloop.config.server import EngineSettings

SETTINGS = EngineSettings(
    dtype="float32", max_model_len=256, max_num_seqs=32, kv_cache_gib=0.25, max_rank=4
)


@pytest.fixture(scope="session")
def vllm_engine(tiny_model: Path) -> Iterator[Engine]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what vllm's imports and its start have to say of torch
        from server.engine.vllm_engine import VllmEngine

        engine = VllmEngine(tiny_model, SETTINGS, seed=0)
    yield engine
    engine.close()
