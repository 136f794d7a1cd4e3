import socket
import threading
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.full_disk import full_disk
from thumbloop.config.shared import Metrics
from thumbloop.errors import SettingsError
from trainer.metrics import TrainerMetrics

PAGE = Path(__file__).parents[2] / "docs" / "algorithm.md"


@pytest.fixture
def metrics(tmp_path) -> TrainerMetrics:
    return TrainerMetrics(tmp_path, Console(quiet=True))


def test_every_metric_is_explained(metrics):
    page = PAGE.read_text()
    names = [family.name for family in metrics.registry.collect()]
    assert names
    assert [name for name in names if f"`{name}`" not in page] == []


def test_a_port_in_use_is_an_error_that_says_what_to_do(metrics):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SettingsError, match="choose another port"):
            metrics.serve(Metrics(port=taken.getsockname()[1]))


def test_a_rounds_numbers_become_curves(metrics, tmp_path):
    for number, auroc in ((1, 0.5), (2, 0.75)):
        metrics.round_ended(number, "blocked", 1.0, {"reward_auroc": auroc}, {})
    curves = EventAccumulator(str(tmp_path)).Reload()
    points = [(event.step, event.value) for event in curves.Scalars("round/reward_auroc")]
    assert points == [(1, 0.5), (2, 0.75)]


def test_left_out_counts_are_of_the_last_round_only(metrics):
    metrics.round_ended(1, "blocked", 1.0, {"reward_auroc": 0.5}, {"candidate": {"greedy": 3}})
    metrics.round_ended(2, "blocked", 1.0, {"reward_auroc": 0.6}, {"candidate": {"used": 2}})
    value = metrics.registry.get_sample_value
    assert value("thumbloop_trainer_left_out", {"kind": "candidate", "reason": "greedy"}) is None
    assert value("thumbloop_trainer_left_out", {"kind": "candidate", "reason": "used"}) == 2
    assert value("thumbloop_trainer_value", {"name": "reward_auroc"}) == 0.6


# TensorBoard's own thread dies of it, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_curves_go_without_what_a_full_disk_did_not_take(tmp_path):
    lines, others = [], set(threading.enumerate())
    metrics = TrainerMetrics(tmp_path, Console(quiet=True))
    metrics.say = lines.append
    metrics.round_ended(1, "blocked", 1.0, {"reward_auroc": 0.5}, {})
    with full_disk(0):
        for number in (2, 3):
            metrics.round_ended(number, "blocked", 1.0, {"reward_auroc": 0.6}, {})
    for dying in set(threading.enumerate()) - others:
        dying.join(30)  # its last words are this test's, not the next one's
    metrics.round_ended(4, "blocked", 1.0, {"reward_auroc": 0.75}, {})
    assert [line.partition(":")[0] for line in lines] == [
        "TensorBoard's curves go without round 2",
        "TensorBoard's curves go without round 3",
    ]
    curves = EventAccumulator(str(tmp_path)).Reload()
    # In any order: files of one second are read by their number as a word, 10 before 9.
    points = [(event.step, event.value) for event in curves.Scalars("round/reward_auroc")]
    assert sorted(points) == [(1, 0.5), (4, 0.75)]


def test_a_log_on_a_full_disk_loses_lines_and_not_the_trainer(tmp_path):
    with (tmp_path / "log").open("w") as log:
        metrics = TrainerMetrics(tmp_path, Console(file=log))
        metrics.say("before")
        with full_disk(0):
            metrics.say("while it is full")
        metrics.say("after")
    assert "before\n" in (tmp_path / "log").read_text()
    assert "after\n" in (tmp_path / "log").read_text()
