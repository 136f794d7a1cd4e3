"""Matrix products by a fixed small matrix, in the form that costs least per call on a CPU."""

from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops

_PRIMITIVES = 32
"""Batch sizes for which a prepacked matrix remembers its kernel."""
WORTH_PACKING = 32
"""Products by a matrix before it is packed."""


class Product(Protocol):
    """A fixed matrix M (O, I), multiplied from the right: x M^T."""

    def of(self, x: Tensor) -> Tensor:
        """Return x M^T (R, O) for x (R, I)."""

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add x M^T to y (R, O) in place."""


class Dense:
    """A plain matrix: the fastest for float32, where MKL has no packing to save."""

    def __init__(self, matrix: Tensor) -> None:
        self._transposed = matrix.t().contiguous()

    def of(self, x: Tensor) -> Tensor:
        """Return the product; see Product."""
        return torch.mm(x, self._transposed)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add the product; see Product."""
        y.addmm_(x, self._transposed)


class Prepacked:
    """A matrix packed by vLLM's oneDNN handler: in bfloat16 a third of torch's time per call.

    To pack it costs as much as it saves in dozens of calls; many a set of adapters meets in fewer. Until
    then torch multiplies: a new version's probes are, as a rule, read that way.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._transposed = matrix.t()
        self._calls = 0

    @cached_property
    def _handler(self) -> Any:
        return vllm_ops.create_onednn_mm(self._transposed, _PRIMITIVES)

    def of(self, x: Tensor) -> Tensor:
        """Return the product; see Product."""
        if self._calls < WORTH_PACKING:
            self._calls += 1
            return torch.mm(x, self._transposed)
        y = x.new_empty(x.shape[0], self._handler.n)
        torch.ops._C.onednn_mm(y, x, None, self._handler.handler_tensor)
        return y

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add the product; see Product."""
        y.add_(self.of(x))


def product(matrix: Tensor) -> Product:
    """Return the cheaper form for the matrix's dtype."""
    is_prepacked = matrix.dtype is torch.bfloat16 and vllm_ops._supports_onednn
    return Prepacked(matrix) if is_prepacked else Dense(matrix)
