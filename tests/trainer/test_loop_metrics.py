"""What a round says of itself, and to whom."""

import time
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from tests.bench import Bench
from tests.finding import found
from tests.prometheus import complaints
from thumbloop.config.shared import RewardComponent


def test_every_component_of_the_reward_is_logged(tmp_path, tiny_model):
    components = {
        "thumbs": RewardComponent(kind="thumbs", weight=0.75),
        "short": RewardComponent(kind="length", weight=0.25, scale_tokens=1),
    }
    bench = Bench(tmp_path, tiny_model, rewards=components)
    bench.rate(40)
    bench.loop.step()
    metrics = bench.get(1).metrics
    assert metrics["reward_mean"] == pytest.approx(
        0.75 * metrics["reward_mean_thumbs"] + 0.25 * metrics["reward_mean_short"]
    )
    assert -6 <= metrics["reward_mean_short"] <= -4
    bench.engine.dispose()


def test_nothing_that_users_said_is_written_anywhere_but_into_the_store(bench, tmp_path):
    bench.rate(40)
    assert bench.loop.step()
    said = ("How was the film", "reply 0", "reply 1", "user 3", "a session")
    assert list((tmp_path / "tensorboard").iterdir())
    assert set(found(tmp_path, *said)) <= {"thumbloop.db", "thumbloop.db-wal"}
    assert not any(words in line for words in said for line in bench.lines)


def test_every_number_of_a_version_is_explained(bench):
    bench.rate(40)
    bench.loop.step()
    page = (Path(__file__).parents[2] / "docs" / "algorithm.md").read_text()
    assert [name for name in bench.get(1).metrics if f"`{name}`" not in page] == []


def test_every_metric_of_a_round_is_exported(bench):
    bench.rate(40)
    bench.loop.step()
    registry = bench.metrics.registry
    sample = registry.get_sample_value
    assert sample("thumbloop_trainer_rounds_total", {"outcome": "published"}) == 1
    assert sample("thumbloop_trainer_feedback_used_total") == 40
    assert sample("thumbloop_trainer_value", {"name": "reward_auroc"}) > 0.5
    assert sample("thumbloop_trainer_left_out", {"kind": "candidate", "reason": "over_limit"}) == 16
    assert sample("thumbloop_trainer_stage_seconds_count", {"stage": "ppo"}) == 1
    assert sample("thumbloop_trainer_value", {"name": "rollout_staleness"}) == 0
    assert sample("thumbloop_trainer_limit", {"name": "kl_to_reference"}) == 20
    assert sample("thumbloop_trainer_rollouts_used_total") == 64
    assert sample("thumbloop_trainer_optimizer_steps_total") > 0
    assert sample("thumbloop_trainer_round") == 1


def test_prometheus_own_linter_has_nothing_to_say(bench):
    bench.rate(40)
    bench.loop.step()
    page = generate_latest(bench.metrics.registry).decode()
    assert "thumbloop_trainer_stage_seconds_bucket" in page
    assert complaints(page) == []


def test_when_the_trainer_looked_and_published_last_is_exported(bench):
    sample = bench.metrics.registry.get_sample_value
    bench.rate(40)
    before = time.time()
    bench.loop.step()
    assert sample("thumbloop_trainer_last_success_timestamp_seconds") == 0
    bench.loop.step()  # waits for the server to try version 1
    assert before < sample("thumbloop_trainer_last_success_timestamp_seconds") < time.time()
    assert before < sample("thumbloop_trainer_last_look_timestamp_seconds") < time.time()
    assert sample("thumbloop_trainer_new_feedback") == 40
    assert sample("thumbloop_trainer_needed_feedback") > 40  # tried ones alone start no round
    for loop in (bench.loop, bench.new_loop()):
        bench.adopt(1)
        loop.step()
        assert sample("thumbloop_trainer_needed_feedback") == 32
        assert sample("thumbloop_trainer_last_success_timestamp_seconds") > before
