import socket
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
