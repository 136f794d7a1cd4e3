import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from trainer.fused_lora import FusedLinear


def model(*, fused: bool, bias: bool) -> nn.Module:
    """Two layers with two adapters each, the same whether fused or not."""
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 4, bias=bias))
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"])
    if fused:
        config._register_custom_module({nn.Linear: FusedLinear})
    adapted = get_peft_model(base, config, adapter_name="policy")
    adapted.add_adapter("reward", config)
    source = torch.Generator().manual_seed(4)
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=source)
    kinds = [type(m) for m in adapted.modules() if isinstance(m, Linear)]
    assert kinds == [FusedLinear if fused else Linear] * 2
    return adapted


def said(adapted: nn.Module, *, of_input: bool):
    """Return output and gradients for an input (2, 3, 5)."""
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(5)).requires_grad_(of_input)
    out = adapted(x)
    if not out.requires_grad:
        return [out]
    out.square().sum().backward()
    own = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    return [out, x.grad, own] if of_input else [out, own]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("of_input", [False, True])
def test_outputs_and_gradients_are_pefts_own(bias, of_input):
    ours, theirs = (said(model(fused=f, bias=bias), of_input=of_input) for f in (True, False))
    torch.testing.assert_close(ours, theirs)
    assert ours[-1].keys() == theirs[-1].keys()
    assert len(ours[-1]) == 4  # A and B of two layers: the active adapter's alone


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.set_adapter("reward"),
        lambda m: m.base_model.set_adapter(["policy", "reward"]),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.merge_adapter(["policy"]),
        lambda m: m.half(),
    ],
    ids=["other adapter", "both adapters", "no adapter", "merged", "half"],
)
def test_whatever_is_active_the_layer_says_what_pefts_own_says(change):
    both = [model(fused=fused, bias=True) for fused in (True, False)]
    for each in both:
        change(each)
    dtype = next(both[0].parameters()).dtype
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(5)).to(dtype)
    ours, theirs = (each(x) for each in both)
    close = {} if dtype is torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(ours, theirs, **close)
