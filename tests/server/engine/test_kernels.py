"""vLLM's kernels against the operations that they take the place of."""

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's imports have to say of torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm

    from server.engine.kernels import CpuRMSNorm, register_kernels

HIDDEN = 48
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


@pytest.fixture
def norm(request: pytest.FixtureRequest) -> RMSNorm:
    register_kernels()
    register_kernels()  # the second time nothing happens
    config = VllmConfig()
    config.compilation_config.custom_ops = ["all"]
    with set_current_vllm_config(config):
        norm = RMSNorm(HIDDEN, dtype=request.param)
    norm.weight.data.normal_()
    return norm


@pytest.mark.parametrize("norm", [torch.float32, torch.bfloat16], ids=str, indirect=True)
@pytest.mark.parametrize("rows", [1, 7])
def test_rms_norm_is_what_its_operations_are(norm, rows):
    assert norm._forward_method == norm.forward_cpu  # of CpuRMSNorm: there is no other
    assert isinstance(norm, CpuRMSNorm)
    dtype = norm.weight.dtype
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    x, residual = torch.randn(rows, HIDDEN).to(dtype), torch.randn(rows, HIDDEN).to(dtype)
    torch.testing.assert_close(norm(x.clone()), norm.forward_native(x.clone()), **close)
    y, total = norm(x.clone(), residual.clone())
    torch.testing.assert_close(total, (x.double() + residual.double()).to(dtype), **close)
    torch.testing.assert_close(y, norm.forward_native(x + residual), **close)


@pytest.mark.parametrize("norm", [torch.float32], ids=str, indirect=True)
def test_what_the_kernel_cannot_do_is_left_to_the_operations(norm):
    columns = torch.randn(HIDDEN, 5).t()
    torch.testing.assert_close(norm(columns), norm(columns.contiguous()))
    x, residual = torch.randn(5, HIDDEN), torch.randn(HIDDEN, 5).t()
    y, total = norm(x.clone(), residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, norm.forward_native(x + residual))
    other_dtype = torch.randn(3, HIDDEN).double()
    torch.testing.assert_close(norm(other_dtype).float(), norm(other_dtype.float()))
