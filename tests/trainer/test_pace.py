import time

import pytest
import torch

from trainer.pace import Pace


@pytest.fixture
def slept(monkeypatch):
    """A clock that stands still but for work, and the rests that were taken."""
    rests: list[float] = []
    monkeypatch.setattr(time, "sleep", rests.append)
    return rests


def work(monkeypatch, pace: Pace, costs: list[float]) -> None:
    now = 0.0
    monkeypatch.setattr(time, "process_time", lambda: now)
    for cost in pace.rested(costs):
        now += cost


@pytest.mark.parametrize(("share", "rests"), [(1.0, [0, 0]), (0.5, [2, 3]), (0.25, [6, 9])])
def test_rests_leave_work_its_share_of_the_time(monkeypatch, slept, share, rests):
    work(monkeypatch, Pace(share, torch.device("cpu")), [2.0, 3.0])
    assert slept == pytest.approx(rests)
    assert 5.0 / (5.0 + sum(slept)) == pytest.approx(share)


def test_time_spent_elsewhere_is_no_work(monkeypatch, slept):
    """Where serving goes first, the trainer waits for the processor: that is rest enough."""
    pace = Pace(0.5, torch.device("cpu"))
    monkeypatch.setattr(time, "perf_counter", lambda: 1e9)
    work(monkeypatch, pace, [0.0, 0.0])
    assert slept == [0, 0]
