"""LoRA in one step: a frozen matrix and its update, forward and backward without passes over the output.

PEFT computes base(x), A x, B of it, its scaled copy and the sum one by one, and autograd the same backward.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class FusedLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer, saved and loaded as ever, with a faster forward where one adapter is active."""

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Return W x + scale B A x + bias, (..., in) -> (..., out)."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        is_plain = len(names) == 1 and not (self.disable_adapters or self.merged)
        base = self.base_layer
        out: Tensor
        if is_plain and base.weight.dtype == self.lora_A[names[0]].weight.dtype == x.dtype:
            a, b = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
            out = _Fused.apply(x, base.weight, base.bias, a, b, self.scaling[names[0]])  # type: ignore[no-untyped-call]
        else:
            out = super().forward(x, *arguments, **options)
        return out


class _Fused(torch.autograd.Function):
    """y = x W^T + bias + scale (x A^T) B^T; W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.t()
        out = F.linear(rows, weight, bias)
        out.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        of_out = gradient.reshape(-1, gradient.shape[-1])
        of_inner = (of_out @ b).mul_(ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (of_out @ weight).addmm_(of_inner, a).view(ctx.shape)
        return of_x, None, None, of_inner.t() @ rows, (of_out.t() @ inner).mul_(ctx.scale), None
