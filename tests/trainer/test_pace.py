import time

import pytest
import torch

from trainer.pace import Pace

CPU = torch.device("cpu")


class Machine:
    """A clock that stands still but for work, and the rests that were taken."""

    def __init__(self, monkeypatch):
        self.worked_s, self.rests_s = 0.0, []
        monkeypatch.setattr(time, "process_time", lambda: self.worked_s)
        monkeypatch.setattr(time, "perf_counter", lambda: 1e9)  # waiting for a processor is no work
        monkeypatch.setattr(time, "sleep", self.rests_s.append)

    def work(self, pace: Pace, *costs_s: float) -> None:
        for cost_s in costs_s:
            self.worked_s += cost_s
            pace.rest()


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.mark.parametrize(("share", "rests_s"), [(0.5, [2, 3]), (0.25, [6, 9])])
def test_rests_leave_work_its_share_of_the_time(machine, share, rests_s):
    machine.work(Pace(share, CPU), 2.0, 3.0)
    assert machine.rests_s == pytest.approx(rests_s)
    assert 5.0 / (5.0 + sum(machine.rests_s)) == pytest.approx(share)


def test_who_may_have_all_of_the_time_takes_no_rest(machine):
    machine.work(Pace(1.0, CPU), 2.0, 3.0)
    assert machine.rests_s == []


def test_what_is_done_between_batches_is_rested_from_too(machine):
    pace = Pace(0.5, CPU)
    machine.worked_s += 4.0  # an optimizer's step, a critic's fit
    machine.work(pace, 1.0)
    assert machine.rests_s == [5.0]


def test_a_round_does_not_rest_from_what_was_before_it(machine):
    pace = Pace(0.5, CPU)
    machine.worked_s += 4.0
    pace.start()
    machine.work(pace, 1.0)
    assert machine.rests_s == [1.0]
