"""Grouped LoRA against one row at a time: each row gets its own adapter's change, and no other's."""

import warnings
from collections.abc import Sequence

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's imports have to say of torch
    from server.engine import grouped_lora, products
    from server.engine.grouped_lora import GroupedLora, Plan, make_plan
    from tests.lora_layers import (
        ADAPTER_IN,
        BATCHES,
        INPUTS,
        SLOT_OF,
        TOLERANCE,
        Layer,
        begin,
        make_layer,
    )


@pytest.fixture
def lora() -> GroupedLora:
    return GroupedLora(max_num_batched_tokens=512, max_batches=64, device="cpu")


def run(lora: GroupedLora, layer: Layer, adapters: list[int]):
    """Return (what the operators add, what they should add) for one input a row."""
    dtype = layer.a[0].dtype
    torch.manual_seed(len(adapters))
    x = torch.randn(len(adapters), INPUTS).to(dtype)
    before = torch.randn(len(adapters), sum(layer.outputs)).to(dtype)
    y = before.clone()
    lora.add_lora_linear(y, x, layer.a, layer.b, 1.0, layer.outputs)
    expected = torch.stack(
        [
            row.double() + (layer.change(given, adapter) if adapter else 0)
            for row, given, adapter in zip(before, x, adapters, strict=True)
        ]
    )
    return y.double(), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [(16,), (32, 32), (32, 8, 8)], ids=str)
@pytest.mark.parametrize("adapters", BATCHES.values(), ids=BATCHES)
def test_each_row_gets_its_own_adapters_change(lora, adapters, outputs, dtype, monkeypatch):
    begin(lora, adapters)
    layer = make_layer(outputs, dtype)
    for calls_before in (products.WORTH_PACKING, 0):  # a set that is new, and one in long use
        monkeypatch.setattr(products, "WORTH_PACKING", calls_before)
        y, expected = run(lora, layer, adapters)
        torch.testing.assert_close(y, expected, atol=TOLERANCE[dtype] * 10, rtol=TOLERANCE[dtype])


def test_rows_of_the_base_model_are_left_as_they_are_to_the_bit(lora):
    layer, adapters = make_layer((32, 8, 8)), [0, 7, 0, 3]
    begin(lora, adapters)
    y = torch.randn(4, 48)
    before = y.clone()
    lora.add_lora_linear(y, torch.randn(4, INPUTS), layer.a, layer.b, 1.0, layer.outputs)
    assert torch.equal(y[[0, 2]], before[[0, 2]])
    assert not torch.equal(y[[1, 3]], before[[1, 3]])


def test_a_batch_without_adapters_is_left_alone(lora):
    begin(lora, [0, 0])
    y, expected = run(lora, make_layer((16,)), [0, 0])
    assert torch.equal(y, expected)


def test_a_slot_that_is_filled_anew_speaks_with_its_new_weights(lora):
    layer, adapters = make_layer((16,)), [3, 7, 3]
    begin(lora, adapters)
    run(lora, layer, adapters)
    layer.b[0][SLOT_OF[3]].normal_()
    begin(lora, [5, 7, 5], [7, None, 5, 9])  # adapter 3 went, 5 came into its slot
    y, expected = run(lora, layer, adapters)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)


def test_a_slot_that_is_filled_anew_leaves_the_other_sets_packed(lora):
    layer, adapters = make_layer((32, 8, 8)), [3, 7, 3]
    begin(lora, adapters)
    run(lora, layer, adapters)
    module = lora.module(layer.a, layer.b)
    alone, mixed = module.packed((0,)), module.packed((0, 2))
    begin(lora, [5, 7, 5], [7, None, 5, 9])
    assert module.packed((0,)) is alone
    assert module.packed((0, 2)) is not mixed


def test_a_matrix_is_packed_once_it_has_proved_to_be_in_use():
    if not products.vllm_ops._supports_onednn:
        pytest.skip("this machine's vLLM packs nothing")
    product = products.product(torch.randn(8, INPUTS).bfloat16())
    for _ in range(products.WORTH_PACKING):
        product.of(torch.ones(2, INPUTS).bfloat16())
    assert "_handler" not in vars(product)
    product.of(torch.ones(2, INPUTS).bfloat16())
    assert "_handler" in vars(product)


def test_an_adapter_of_zeros_costs_nothing_and_changes_nothing(lora):
    layer, adapters = make_layer((16,)), [3, 7, 3]
    layer.b[0][SLOT_OF[3]].zero_()
    begin(lora, adapters)
    y, expected = run(lora, layer, adapters)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
    packed = lora.module(layer.a, layer.b).packed((0, 2))
    assert packed is not None
    assert packed.slots == (0,)


def test_layers_of_unlike_shape_share_a_batch(lora):
    begin(lora, adapters := [7, 3, 0, 9])
    for outputs in ((16,), (32, 8, 8), (32, 32), (16,)):
        y, expected = run(lora, make_layer(outputs), adapters)
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)


def rows_of(plan: Plan | None) -> dict[int | None, list[int]]:
    assert plan is not None
    every = torch.arange(plan.size)
    named = {group.slot: every[group.rows].tolist() for group in plan.groups}
    return named if plan.rest is None else named | {None: every[plan.rest].tolist()}


def test_the_plan_names_the_rows_of_each_slot():
    plan = make_plan([3, 0, 7, 3], ADAPTER_IN)
    assert rows_of(plan) == {0: [2], 2: [0, 3], None: [1]}
    assert plan is not None
    assert not plan.is_uniform
    assert make_plan([0, 0], ADAPTER_IN) is None
    assert rows_of(uniform := make_plan([9, 9], ADAPTER_IN)) == {3: [0, 1]}
    assert uniform is not None
    assert uniform.is_uniform
    assert rows_of(beside_base := make_plan([9, 0], ADAPTER_IN)) == {3: [0], None: [1]}
    assert beside_base is not None
    assert not beside_base.is_uniform


def test_a_step_is_planned_once_and_not_for_each_of_its_layers(lora, monkeypatch):
    planned: list[list[int]] = []

    def counted(adapters: Sequence[int], adapter_in: Sequence[int | None]) -> Plan | None:
        planned.append(list(adapters))
        return make_plan(adapters, adapter_in)

    monkeypatch.setattr(grouped_lora, "make_plan", counted)
    layers = [make_layer(outputs) for outputs in ((16,), (32, 8, 8), (32, 32), (16,))]
    for adapters in ([7, 3, 0, 9], [3] * 20):
        begin(lora, adapters)
        for layer in layers:
            run(lora, layer, adapters)
    assert planned == [[7, 3, 0, 9], [3] * 20]


def test_rows_that_follow_one_another_are_no_copy():
    plan = make_plan([3, 3, 7, 7, 7, 3], ADAPTER_IN)
    assert plan is not None
    seven, three = plan.groups
    assert seven.rows == slice(2, 5)
    assert isinstance(three.rows, torch.Tensor)


def test_embeddings_and_the_head_are_refused(lora):
    for operator in (lora.add_lora_logits, lora.add_lora_embedding):
        with pytest.raises(AssertionError, match="linear layers only"):
            operator(None, None, None, None)
