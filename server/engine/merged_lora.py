"""Adapters merged into copies of a small model's weights: there LoRA costs nothing per token.

y = x (W + B A)^T, one product for each adapter of a batch, instead of one by W and two more for the change.
For float32 only: in bfloat16 a small change would be rounded away. `engine.merged_gib` bounds the copies.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from server.engine.grouped_lora import GroupedLora, Piece

_KERNELS = 32  # that oneDNN remembers for a matrix, one a batch size; vLLM's own number

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Multiplies (..., I) by a layer's weights, adds its bias if any: (..., O). vLLM's `cpu_linear`."""


class Copy(NamedTuple):
    """W + B A, packed, and the adapter that it was made of."""

    piece: Piece
    packed: Any


class MergedLinear:
    """Takes the place of a layer's product by W, and does what its LoRA operators would add to it."""

    def __init__(self, lora: GroupedLora, layer: BaseLinearLayerWithLoRA) -> None:
        self._lora = lora
        self._linear: Linear = layer.base_layer.cpu_linear
        self._module = lora.module(layer.lora_a_stacked, layer.lora_b_stacked)
        # vLLM keeps W in packed form only; a product by the identity gives it back to the bit: (I, O).
        identity = torch.eye(layer.input_size)
        self._transposed = self._linear(identity, layer.base_layer.weight, None)
        self._copies: dict[int, Copy] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output (..., O) for x (..., I), each row by its own adapter's weights."""
        y = self._multiply(x.flatten(0, -2), weight, bias)
        return y.view(*x.shape[:-1], y.shape[1])

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plan = self._lora.plan
        if plan is None:
            return self._linear(x, weight, bias)
        assert plan.size == len(x), "vLLM plans a batch for just its rows"
        if plan.is_uniform:
            return self._multiply_by(plan.groups[0].slot, x, weight, bias)
        y = x.new_empty(len(x), self._transposed.shape[1])
        for slot, rows in plan.groups:
            y[rows] = self._multiply_by(slot, x[rows], weight, bias)
        if plan.rest is not None:
            y[plan.rest] = self._linear(x[plan.rest], weight, bias)
        return y

    def _multiply_by(self, slot: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        piece = self._module.piece(slot)
        if not piece.rank:
            return self._linear(x, weight, bias)
        copy = self._copies.get(slot)
        if copy is None or copy.piece is not piece:
            copy = self._copies[slot] = Copy(piece, self._merge(piece))
        y: Tensor = vllm_ops.onednn_mm(copy.packed, x, bias)
        return y

    def _merge(self, piece: Piece) -> Any:
        merged, first = self._transposed.clone(), 0
        for a, b in zip(piece.a, piece.b, strict=True):
            part = merged[:, first : first + len(b)]
            part.addmm_(a[: piece.rank].t(), b[:, : piece.rank].t())
            first += len(b)
        return vllm_ops.create_onednn_mm(merged, _KERNELS)


def merge_adapters(
    lora: GroupedLora, layers: Iterable[BaseLinearLayerWithLoRA], slots: int, most_bytes: float
) -> bool:
    """Let every layer multiply by merged weights, if what all slots need fits; say whether it does.

    That is W once and a copy for each slot, and the adapters themselves out of vLLM's slots.
    """
    layers = list(layers)
    weights = sum(
        layer.input_size * sum(len(b[0, 0]) for b in layer.lora_b_stacked) for layer in layers
    )
    adapters = sum(
        part.numel() for layer in layers for part in (*layer.lora_a_stacked, *layer.lora_b_stacked)
    )
    is_float32 = all(layer.lora_a_stacked[0].dtype is torch.float32 for layer in layers)
    is_packed = vllm_ops._supports_onednn and all(
        hasattr(layer.base_layer, "cpu_linear") for layer in layers
    )
    needed_bytes = 4 * (weights * (slots + 1) + adapters)
    if not (is_float32 and is_packed and needed_bytes <= most_bytes):
        return False
    for layer in layers:
        layer.base_layer.cpu_linear = MergedLinear(lora, layer)
    lora.is_merged = True
    return True
