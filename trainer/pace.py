"""Rests of the trainer, so that serving keeps the rest of the machine."""

import time

import torch


class Pace:
    """Computes at most a share of the time: every rest is as long as what was done since the last one asks for."""

    def __init__(self, share: float, device: torch.device) -> None:
        self._rest_per_work = 1 / share - 1
        self._device = device
        self._rested = 0.0
        self.start()

    def start(self) -> None:
        """Begin with a round: whatever was before is not to be rested from."""
        if self._rest_per_work:
            self._rested = self._now()

    def rest(self) -> None:
        """Rest from all that was done since the last rest."""
        if self._rest_per_work:
            time.sleep(self._rest_per_work * (self._now() - self._rested))
            self._rested = self._now()

    def _now(self) -> float:
        """Return what work has cost so far, seconds: of a CPU, or of a GPU's time."""
        if self._device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self._device)
        return time.perf_counter()
