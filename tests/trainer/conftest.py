from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench import Bench
from thumbloop.config.trainer import Lora
from thumbloop.rendering import VerdictTokens
from trainer.models import ADAPTERS, Adapter, Trunk

VERDICT = VerdictTokens(prompt=(3,), up=4, down=5, is_special=True)
LORA = Lora(rank=4, alpha=8)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=160,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Compute as the trainer does: on tensors this small a second thread only waits, and on a busy machine spins."""
    torch.set_num_threads(1)


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, tiny_model)
    yield bench
    bench.engine.dispose()


@pytest.fixture
def base_model() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture
def trunk() -> Trunk:
    return Trunk(tiny_model(), LORA, VERDICT)


@pytest.fixture
def trained_weights(trunk: Trunk) -> dict[Adapter, dict[str, Tensor]]:
    """Weights of adapters that both do something."""
    source = torch.Generator().manual_seed(8)
    return {
        adapter: {
            name: 0.1 * torch.randn(parameter.shape, generator=source)
            for name, parameter in trunk.parameters(adapter).items()
        }
        for adapter in ADAPTERS
    }


@pytest.fixture
def trained_trunk(trunk: Trunk, trained_weights: dict[Adapter, dict[str, Tensor]]) -> Trunk:
    """A trunk whose adapters both do something."""
    for adapter, weights in trained_weights.items():
        trunk.restore(adapter, weights)
    return trunk


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
