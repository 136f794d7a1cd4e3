"""Rests of the trainer, so that serving keeps the rest of the machine."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


class Pace:
    """Computes at most a share of the time: after each piece of work it rests as long as that takes."""

    def __init__(self, share: float, device: torch.device) -> None:
        self._rest_per_work = 1 / share - 1
        self._device = device

    def rested(self, work: Iterable[T]) -> Iterator[T]:
        """Yield pieces of work, with a rest after each; the last one's comes before the loop ends."""
        for piece in work:
            started = self._now()
            yield piece
            time.sleep(self._rest_per_work * (self._now() - started))

    def _now(self) -> float:
        """Return what work has cost so far, seconds: of a CPU, or of a GPU's time."""
        if self._device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self._device)
        return time.perf_counter()
