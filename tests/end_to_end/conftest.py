"""vLLM engines on the CPU for the whole run: each takes a quarter of a minute to start.

Tests that use one share its event loop: `pytestmark = pytest.mark.asyncio(loop_scope="session")`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.engine import Engine
from thumbloop.config.server import EngineSettings

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


@pytest.fixture(scope="module")
def bfloat16_engine(tiny_model: Path) -> Iterator[Engine]:
    """Grouped LoRA over packed matrices: what is merged in float32 is not in bfloat16."""
    with started(tiny_model, dtype="bfloat16") as engine:
        yield engine


@pytest.fixture(scope="module")
def stock_engine(tiny_model: Path) -> Iterator[Engine]:
    """vLLM's own operators."""
    with started(tiny_model, grouped_lora=False) as engine:
        yield engine
