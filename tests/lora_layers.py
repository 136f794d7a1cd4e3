"""Adapters of one layer as vLLM stacks them, and batches that mix them, for every way to apply them."""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from server.engine.grouped_lora import MANY_ROWS, GroupedLora

SLOTS, RANK, INPUTS = 4, 8, 24
ADAPTER_IN = [7, None, 3, 9]  # the adapter that each slot holds
SLOT_OF = {7: 0, 3: 2, 9: 3}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


class Layer(NamedTuple):
    """Adapters of one wrapped layer, as vLLM stacks them."""

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    outputs: tuple[int, ...]

    def change(self, x: torch.Tensor, adapter: int) -> torch.Tensor:
        """Return what an adapter adds for one input, by the definition of LoRA."""
        slot = SLOT_OF[adapter]
        parts = [
            b[slot, 0].double() @ (a[slot, 0].double() @ x.double())
            for a, b in zip(self.a, self.b, strict=True)
        ]
        return torch.cat(parts)


def make_layer(outputs: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Layer:
    torch.manual_seed(len(outputs))
    ranks = {0: RANK, 2: 3, 3: 1}
    a = tuple(torch.zeros(SLOTS, 1, RANK, INPUTS, dtype=dtype) for _ in outputs)
    b = tuple(torch.zeros(SLOTS, 1, size, RANK, dtype=dtype) for size in outputs)
    for slot, rank in ranks.items():
        for one, other in zip(a, b, strict=True):
            one[slot, 0, :rank] = torch.randn(rank, INPUTS) / INPUTS**0.5
            other[slot, 0, :, :rank] = torch.randn(other.shape[2], rank)
    return Layer(a, b, outputs)


def begin(lora: GroupedLora, adapters: list[int], adapter_in: list[int | None] | None = None):
    mapping = SimpleNamespace(index_mapping=tuple(adapters))
    lora.update_metadata(mapping, adapter_in or ADAPTER_IN, SLOTS + 1, 300)


BATCHES = {
    "one row": [7],
    "alike": [3] * 20,
    "mixed": [7, 3, 3, 9, 7],
    "mixed, more rows": [7, 3, 9, 3] * 8,
    "with rows of the base model": [0, 7, 0, 3, 3, 0],
    "one adapter beside the base model": [0, 9, 9, 0],
    "many rows": [7] * 50 + [3] * 60 + [0] * 30 + [9] + [7] * 3,
    "many alike": [9] * (2 * MANY_ROWS),
}
