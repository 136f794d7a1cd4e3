"""Adapters merged into the weights against LoRA's definition, one row at a time."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's imports have to say of torch
    from vllm import _custom_ops as vllm_ops

    from server.engine.grouped_lora import GroupedLora
    from server.engine.merged_lora import merge_adapters
    from tests.lora_layers import BATCHES, INPUTS, SLOT_OF, SLOTS, Layer, begin, make_layer

pytestmark = pytest.mark.skipif(
    not vllm_ops._supports_onednn, reason="this machine's vLLM packs nothing"
)

GIB = 1 << 30


class Wrapped:
    """A linear layer as vLLM keeps it: the weights packed, the adapters stacked beside it."""

    def __init__(self, adapters: Layer) -> None:
        self.lora_a_stacked, self.lora_b_stacked = adapters.a, adapters.b
        self.input_size = INPUTS
        self.weights = torch.randn(sum(adapters.outputs), INPUTS, dtype=adapters.a[0].dtype)
        packed = vllm_ops.create_onednn_mm(self.weights.t(), 32)
        self.base_layer = SimpleNamespace(
            weight=None, cpu_linear=lambda x, _weight, bias: vllm_ops.onednn_mm(packed, x, bias)
        )

    def of(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.base_layer.cpu_linear(x, self.base_layer.weight, bias)


@pytest.fixture
def lora() -> GroupedLora:
    return GroupedLora(max_num_batched_tokens=512, max_batches=64, device="cpu")


def merged(lora: GroupedLora, adapters: Layer) -> Wrapped:
    layer = Wrapped(adapters)
    layers: list[Any] = [layer]
    assert merge_adapters(lora, layers, SLOTS, GIB)
    return layer


def expected(
    layer: Wrapped, adapters: Layer, x: torch.Tensor, of_rows: list[int], bias: torch.Tensor
) -> torch.Tensor:
    changes = [
        adapters.change(row, number) if number else torch.zeros(sum(adapters.outputs))
        for row, number in zip(x, of_rows, strict=True)
    ]
    return x.double() @ layer.weights.double().T + bias.double() + torch.stack(changes)


@pytest.mark.parametrize("outputs", [(16,), (32, 32), (32, 8, 8)], ids=str)
@pytest.mark.parametrize("of_rows", BATCHES.values(), ids=BATCHES)
def test_each_row_is_multiplied_by_its_own_adapters_weights(lora, of_rows, outputs):
    begin(lora, of_rows)
    adapters = make_layer(outputs)
    layer = merged(lora, adapters)
    x, bias = torch.randn(len(of_rows), INPUTS), torch.randn(sum(outputs))
    y = layer.of(x, bias)
    assert y.shape == (len(of_rows), sum(outputs))
    torch.testing.assert_close(
        y.double(), expected(layer, adapters, x, of_rows, bias), atol=1e-4, rtol=1e-5
    )
    unchanged = y.clone()
    lora.add_lora_linear(y, x, adapters.a, adapters.b, 1.0, adapters.outputs)
    assert torch.equal(y, unchanged)  # what vLLM would add is in it already


def test_an_extra_dimension_stays(lora):
    begin(lora, of_rows := [7, 3, 3, 0])
    adapters = make_layer((16,))
    layer = merged(lora, adapters)
    x = torch.randn(4, INPUTS)
    assert torch.equal(layer.of(x[None]), layer.of(x)[None])
    assert layer.of(x[None]).shape == (1, len(of_rows), 16)


def test_rows_without_an_adapter_are_the_base_models(lora):
    layer = merged(lora, adapters := make_layer((32, 8, 8)))
    x = torch.randn(4, INPUTS)
    base = layer.of(x)
    begin(lora, [0, 7, 0, 3])
    torch.testing.assert_close(layer.of(x)[[0, 2]], base[[0, 2]], atol=1e-6, rtol=1e-6)
    for part in adapters.b:
        part[SLOT_OF[9]].zero_()
    begin(lora, [9, 9, 9, 9])
    assert torch.equal(layer.of(x), base)  # an adapter of zeros needs no copy


def test_a_slot_that_is_filled_anew_is_merged_anew(lora):
    adapters, of_rows = make_layer((16,)), [3, 7, 3]
    layer = merged(lora, adapters)
    x, bias = torch.randn(3, INPUTS), torch.zeros(16)
    begin(lora, of_rows)
    before = layer.of(x)
    adapters.b[0][SLOT_OF[3]].normal_()
    begin(lora, [5, 7, 5], [7, None, 5, 9])  # adapter 3 went, 5 came into its slot
    y = layer.of(x)
    assert torch.equal(y[1], before[1])
    torch.testing.assert_close(
        y.double(), expected(layer, adapters, x, of_rows, bias), atol=1e-4, rtol=1e-5
    )


def test_copies_that_do_not_fit_and_dtypes_that_would_round_are_left_to_grouped_lora(lora):
    adapters = make_layer((16,))
    slots = sum(part.numel() for part in (*adapters.a, *adapters.b))
    for_all_slots = 4 * (16 * INPUTS * (SLOTS + 1) + slots)
    layers: list[Any] = [Wrapped(adapters)]
    assert not merge_adapters(lora, layers, SLOTS, for_all_slots - 1)
    assert not merge_adapters(lora, layers, SLOTS, 0)
    assert not merge_adapters(lora, [Wrapped(make_layer((16,), torch.bfloat16))], SLOTS, GIB)
    assert not lora.is_merged
    assert merge_adapters(lora, layers, SLOTS, for_all_slots)
    assert lora.is_merged
