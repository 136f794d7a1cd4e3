"""vLLM's compiled kernels, where vLLM on a CPU runs a layer as one torch operation after another.

With LoRA vLLM does not compile the model, yet leaves its layers in the form that is made for compiling.
`custom_ops: all` brings back those that have a kernel for CPUs; RMSNorm is left out, so it is here.
https://docs.vllm.ai/en/latest/design/custom_op/ (out-of-tree operators)
"""

import torch
from torch import Tensor
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.layernorm import RMSNorm

_RMS_NORM = "RMSNorm"


class CpuRMSNorm(RMSNorm):  # type: ignore[misc]
    """RMSNorm by vLLM's kernel, a quarter of the time of its operations one by one."""

    def forward_cpu(
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x (R, H), after adding the residual where there is one; both may be written to."""
        is_whole = self.variance_size_override is None and self.has_weight
        given = (x,) if residual is None else (x, residual)
        is_plain = all(t.is_contiguous() and t.dtype is self.weight.dtype for t in given)
        if not (is_whole and is_plain):
            of_operations: Tensor | tuple[Tensor, Tensor] = self.forward_native(x, residual)
            return of_operations
        if residual is None:
            y = torch.empty_like(x)
            torch.ops._C.rms_norm(y, x, self.weight.data, self.variance_epsilon)
            return y
        torch.ops._C.fused_add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)
        return x, residual


def register_kernels() -> None:
    """Let vLLM build its layers with these; once a process."""
    if _RMS_NORM not in op_registry_oot:
        CustomOp.register_oot(CpuRMSNorm, name=_RMS_NORM)
