"""The processes that compute a round together, one for each GPU: data parallel, by accelerate.

All hold the whole model and do the same round on the same data. Each computes its share of the
sequences, and what was computed is added up, so that all go on from the same numbers.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

T = TypeVar("T")

_PATIENCE = timedelta(days=365)
"""How long the others wait for the first one to have a round for them."""


class Workers:
    """One process alone: what is computed by all is computed by it."""

    count = 1
    rank = 0
    device: str | None = None
    """This process's own device; None: it may choose."""

    def share(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield what this process is to compute."""
        return islice(batches, self.rank, None, self.count)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over all processes."""
        return list(tensors)

    def largest(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum over all processes."""
        return tensor

    def tell(self, message: Any) -> Any:
        """Return what the first process says; the others' own message is not heard."""
        return message

    def join(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' parts, with a gradient for this process's own."""
        return part

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give each parameter the sum of all processes' gradients."""

    def descend(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Give each parameter the gradient of a loss that was joined from parts."""
        if loss.requires_grad:  # a small batch may have had no share for this process
            loss.backward()
        self.add_gradients(parameters)


ALONE = Workers()


class Team(Workers):
    """One of several processes, each on a GPU of its own, or on a CPU in tests."""

    def __init__(self, *, cpu: bool) -> None:
        """Meet the others; the launcher has told where."""
        self._state = PartialState(cpu=cpu, timeout=_PATIENCE)
        self.count = self._state.num_processes
        self.rank = self._state.process_index
        self.device = str(self._state.device)
        # NCCL keeps a GPU busy while it waits, and the next round may be hours away.
        self._talk = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over all processes."""
        return [reduce(x, "sum") for x in tensors]

    def largest(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum over all processes."""
        largest: Tensor = reduce(tensor, "max")
        return largest

    def tell(self, message: Any) -> Any:
        """Return what the first process says."""
        box = [message]
        torch.distributed.broadcast_object_list(box, src=0, group=self._talk)
        return box[0]

    def join(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' parts, with a gradient for this process's own."""
        (total,) = self.total([part.detach()])
        return part + (total - part.detach())

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give each parameter the sum of all processes' gradients, in one message."""
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        (total,) = self.total([torch.cat([gradient.flatten() for gradient in own])])
        parts = total.split([gradient.numel() for gradient in own])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
