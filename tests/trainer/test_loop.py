import shutil
import time
from pathlib import Path

import pytest
import torch
from prometheus_client import generate_latest
from sqlalchemy import select, update

from tests.bench import VERDICT, Bench
from tests.finding import found
from tests.prometheus import complaints
from tests.tiny_model import build_tiny_model
from thumbloop import artifacts
from thumbloop.config import TrainerConfig
from thumbloop.config.shared import RewardComponent
from thumbloop.config.trainer import Gate, RewardFit, Round, Supervised
from thumbloop.errors import BadPolicyVersion, StoreUnavailable
from thumbloop.leases import claim
from thumbloop.store import deployments, interactions, preferences, reading, schema
from thumbloop.store.schema import round_inputs
from thumbloop.types import IMPORTED_VERSION, VersionState
from trainer import dataset, probes, publishing, reward
from trainer.learning import Lesson
from trainer.loop import LONGEST_REST_S, RESTS_PER_LOOK
from trainer.ppo import NotFinite

ONE_ROUND = TrainerConfig(round=Round(max_rounds=1, poll_interval_s=0.01))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def test_an_empty_store_waits_and_says_so_once(bench):
    assert not bench.loop.step()
    assert not bench.loop.step()
    assert bench.lines == ["waiting for 32 new thumbs; version 0 is current"]


def test_a_round_publishes_a_version_that_verifies(bench):
    bench.rate(40)
    assert bench.loop.step()
    version = bench.get(1)
    folder = bench.config.state.versions / version.folder
    manifest = artifacts.read_manifest(folder, version.manifest_digest)
    artifacts.verify_files(folder, manifest)
    assert (version.parent, version.feedback_count, version.state) == (0, 40, "published")
    assert version.policy_digest == artifacts.file_digest(folder / "policy" / artifacts.WEIGHTS)
    assert (manifest.base_model, manifest.parent) == (bench.base, 0)
    assert manifest.verdict.up == VERDICT.up
    assert manifest.policy_adapter.distance > 0
    assert manifest.lineage.rollout_candidates == 64
    assert manifest.metrics["reward_auroc"] > 0.6
    assert manifest.metrics["sampler_trainer_kl"] < 1e-6
    assert "state" not in manifest.settings


def test_what_a_round_used_is_recorded_with_its_version(bench):
    bench.rate(40)
    bench.loop.step()
    (row,) = bench.rounds()
    assert (row["parent"], row["version"], row["reason"]) == (0, 1, "published")
    assert row["metrics"]["left_out"]["candidate"] == {"over_limit": 16}
    assert row["metrics"]["came_in"] == {"reply": 40, "thumb": 40, "preference": 0, "candidate": 80}
    with reading(bench.engine) as connection:
        roles = list(connection.scalars(select(round_inputs.c.role)))
    assert (roles.count("new"), roles.count("replay"), roles.count("rollout")) == (40, 0, 32)
    assert bench.new_feedback(0) == 40  # not used up until the version serves
    assert bench.new_feedback(1) == 0


def test_imported_thumbs_teach_beside_others_and_their_replies_are_no_rollouts(bench):
    bench.rate(40)
    made_elsewhere = {"policy_version": IMPORTED_VERSION}
    with bench.engine.begin() as connection:
        connection.execute(update(schema.candidates).values(made_elsewhere | {"logprobs": b""}))
        connection.execute(
            update(schema.interactions).values(
                made_elsewhere | {"trainable": False, "untrainable_reason": "imported"}
            )
        )
    assert not bench.loop.step()
    assert "there are 0 and 40 to learn from" in bench.lines[-1]
    bench.rate(20)
    assert bench.loop.step()
    (row,) = bench.rounds()
    assert (row["version"], row["reason"]) == (1, "published")
    assert row["metrics"]["left_out"]["candidate"] == {"imported": 80}
    with reading(bench.engine) as connection:
        roles = list(connection.scalars(select(round_inputs.c.role)))
    assert (roles.count("new"), roles.count("rollout")) == (60, 20)


def test_preferences_start_a_round_and_are_recorded_apart(tmp_path, model):
    bench = Bench(tmp_path, model, gate=Gate(enabled=False))
    bench.rate(31)
    bench.prefer(9)
    assert bench.loop.step()
    version = bench.get(1)
    assert (version.feedback_count, version.metrics["preferences_used"]) == (40, 9)
    with reading(bench.engine) as connection:
        roles = list(connection.scalars(select(round_inputs.c.role)))
        assert preferences.count_new(connection, "default", [version.round_id]).usable == 0
    assert (roles.count("new"), roles.count("preference")) == (31, 9)
    bench.engine.dispose()


def test_preferences_that_are_turned_off_start_no_round(tmp_path, model):
    bench = Bench(
        tmp_path,
        model,
        reward=RewardFit(learning_rate=1e-2, epochs=3, preference_weight=0.0),
        gate=Gate(enabled=False),
    )
    bench.rate(31)
    bench.prefer(9)
    assert not bench.loop.step()
    bench.rate(1)
    assert bench.loop.step()
    version = bench.get(1)
    with reading(bench.engine) as connection:
        assert preferences.count_new(connection, "default", [version.round_id]).usable == 9
    assert version.metrics["preferences_used"] == 0
    bench.engine.dispose()


def test_with_the_gate_off_whatever_is_finite_is_published(tmp_path, model):
    bench = Bench(tmp_path, model, gate=Gate(enabled=False))
    bench.rate(40, shuffled=True)
    assert bench.loop.step()
    assert bench.versions() == [0, 1]
    bench.engine.dispose()


def test_the_supervised_warm_start_comes_first_and_once(tmp_path, model):
    bench = Bench(tmp_path, model, supervised=Supervised(enabled=True))
    bench.rate(40)
    bench.loop.step()
    assert bench.get(1).metrics["supervised_loss"] > 0
    assert bench.get(1).metrics["sampler_trainer_kl"] < 1e-6  # of the parent, not of the imitator
    bench.adopt(1)
    bench.rate(40, version=1)
    bench.loop.step()
    assert "supervised_loss" not in bench.get(2).metrics
    bench.engine.dispose()


def test_every_component_of_the_reward_is_logged(tmp_path, model):
    components = {
        "thumbs": RewardComponent(kind="thumbs", weight=0.75),
        "short": RewardComponent(kind="length", weight=0.25, scale_tokens=1),
    }
    bench = Bench(tmp_path, model, rewards=components)
    bench.rate(40)
    bench.loop.step()
    metrics = bench.get(1).metrics
    assert metrics["reward_mean"] == pytest.approx(
        0.75 * metrics["reward_mean_thumbs"] + 0.25 * metrics["reward_mean_short"]
    )
    assert -6 <= metrics["reward_mean_short"] <= -4
    bench.engine.dispose()


def test_the_next_round_waits_for_the_server_to_decide(bench):
    bench.rate(40)
    bench.loop.step()
    bench.rate(40)
    assert not bench.loop.step()
    assert bench.lines[-1] == "waiting for the server to try version 1"


def test_rounds_build_on_each_other(bench):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    assert bench.loop.step()
    first, second = bench.get(1), bench.get(2)
    assert second.parent == 1
    assert second.metrics["reward_auroc_bound"] >= first.metrics["reward_auroc_bound"]
    manifest = artifacts.read_manifest(bench.config.state.versions / second.folder)
    assert all(probe.parent_reward is not None for probe in manifest.probes)
    assert second.metrics["parent_kl_to_reference"] >= 0
    with reading(bench.engine) as connection:
        roles = list(connection.scalars(select(round_inputs.c.role)))
    assert roles.count("replay") > 0


def test_a_round_starts_from_its_parents_adapters(bench):
    bench.rate(40)
    bench.loop.step()
    published = bench.trunk.snapshot("policy")
    bench.adopt(1)
    bench.trunk.reset()
    bench.loop._learner.take(Lesson(bench.get(1), 2, 1, data=None))
    for name, parameter in bench.trunk.parameters("policy").items():
        assert torch.equal(parameter, published[name])


def test_random_thumbs_publish_nothing_and_are_given_back(bench):
    bench.rate(40, shuffled=True)
    assert bench.loop.step()
    assert bench.versions() == [0]
    (row,) = bench.rounds()
    assert row["version"] is None
    assert row["reason"].startswith("auroc: ")
    assert bench.new_feedback(0) == 40


def test_a_blocked_round_does_not_spin(bench):
    bench.rate(40, shuffled=True)
    bench.loop.step()
    assert not bench.loop.step()
    bench.rate(15, shuffled=True)
    assert not bench.loop.step()
    bench.rate(1, shuffled=True)
    assert bench.loop.step()
    assert len(bench.rounds()) == 2


def test_a_blocked_round_of_one_busy_user_does_not_spin(tmp_path, model):
    bench = Bench(tmp_path, model)
    bench.config = bench.config.model_copy(
        update={"round": bench.config.round.model_copy(update={"max_user_feedback": 1})}
    )
    bench.loop = bench.new_loop()
    bench.rate(60, shuffled=True)
    assert bench.loop.step()
    (row,) = bench.rounds()
    assert row["metrics"]["feedback_used"] <= 20 < row["metrics"]["feedback_new"] == 60
    assert not bench.loop.step()
    bench.rate(16, shuffled=True)
    assert bench.loop.step()
    bench.engine.dispose()


def test_feedback_that_is_too_old_starts_no_round(tmp_path, model, monkeypatch):
    bench = Bench(tmp_path, model)
    bench.config = bench.config.model_copy(
        update={"round": bench.config.round.model_copy(update={"max_feedback_age_s": 3600.0})}
    )
    bench.loop = bench.new_loop()
    bench.rate(40)  # at the beginning of 1970
    with bench.engine.begin() as connection:
        (response_id, *_) = connection.scalars(select(interactions.interactions.c.response_id))
        user = interactions.get(connection, response_id).user
        preferences.submit_preference(connection, response_id, 1, 0, user, at=1.0)
    monkeypatch.setattr(dataset, "read", None)  # what nothing can be learned from is only counted
    assert not bench.loop.step()
    assert bench.lines[-1].endswith("there are 0, left out {'too_old': 41}")
    assert bench.rounds() == []
    bench.engine.dispose()


def test_a_flood_makes_no_round_due(tmp_path, model):
    bench = Bench(tmp_path, model, gate=Gate(enabled=False))
    settings = bench.config.round.model_copy(update={"max_user_factor": 2.0})
    bench.config = bench.config.model_copy(update={"round": settings})
    bench.loop = bench.new_loop()
    bench.rate(20)
    bench.rate(200, user="loud")
    assert not bench.loop.step()
    assert "left out {'over_user_factor': " in bench.lines[-1]
    assert bench.rounds() == []
    bench.rate(20)
    assert bench.loop.step()
    bench.engine.dispose()


def test_a_rejected_version_does_not_spin_either(bench):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1, VersionState.REJECTED)
    assert not bench.loop.step()
    bench.rate(16)
    assert bench.loop.step()
    assert bench.get(2).parent == 0


def test_too_few_candidates_wait_and_say_why(bench):
    bench.rate(32, version=0)
    with bench.engine.begin() as connection:
        connection.execute(interactions.interactions.update().values(trainable=False))
    assert not bench.loop.step()
    assert "candidate: 64 came in, left out {'untrainable': 64}" in bench.lines[-1]
    assert bench.rounds() == []


def test_feedback_that_nothing_may_be_learned_from_waits_and_says_so(bench):
    bench.rate(40)
    with bench.engine.begin() as connection:
        connection.execute(interactions.interactions.update().values(learning="excluded"))
    assert not bench.loop.step()
    assert bench.lines[-1].endswith("there are 0, left out {'learning_excluded': 40}")
    said = list(bench.lines)
    bench.rate(1)
    assert not bench.loop.step()
    assert bench.lines == said  # a count that goes on is nothing new
    assert bench.rounds() == []


def test_a_round_whose_parent_was_replaced_publishes_nothing_and_says_so(bench, monkeypatch):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    describe = publishing.describe

    def roll_back_meanwhile(*arguments):
        bench.adopt(0)
        return describe(*arguments)

    monkeypatch.setattr(publishing, "describe", roll_back_meanwhile)
    bench.loop.step()
    assert bench.versions() == [0, 1]
    assert bench.rounds()[-1]["reason"].startswith("superseded: version 0 ")
    assert bench.rounds()[-1]["version"] is None
    assert not (bench.config.state.versions / "default" / "000002").exists()
    assert "published nothing: version 0 became current meanwhile" in bench.lines[-1]


def test_a_round_whose_data_was_erased_meanwhile_publishes_nothing(bench, monkeypatch):
    bench.rate(40)
    describe = publishing.describe

    def forget_somebody_meanwhile(*arguments):
        assert bench.forget("user 3").interactions
        return describe(*arguments)

    monkeypatch.setattr(publishing, "describe", forget_somebody_meanwhile)
    assert bench.loop.step()
    assert bench.versions() == [0]
    assert bench.rounds()[-1]["reason"] == (
        "superseded: data that it learned from was erased meanwhile"
    )
    assert not (bench.config.state.versions / "default" / "000001").exists()
    monkeypatch.setattr(publishing, "describe", describe)
    left = bench.new_feedback(0)
    assert 32 <= left < 40
    bench.rate(40 + 16 - left)
    assert bench.loop.step()
    assert not bench.get(1).is_tainted  # nobody's data is in it who is gone


def test_nothing_that_users_said_is_written_anywhere_but_into_the_store(bench, tmp_path):
    bench.rate(40)
    assert bench.loop.step()
    said = ("How was the film", "reply 0", "reply 1", "user 3", "a session")
    assert list((tmp_path / "tensorboard").iterdir())
    assert set(found(tmp_path, *said)) <= {"thumbloop.db", "thumbloop.db-wal"}
    assert not any(words in line for words in said for line in bench.lines)


def test_the_trainer_stops_after_the_set_number_of_rounds(tmp_path, model):
    bench = Bench(tmp_path, model)
    bench.config = bench.config.model_copy(
        update={"round": bench.config.round.model_copy(update={"max_rounds": 1})}
    )
    bench.rate(40)
    bench.new_loop().run()
    assert bench.versions() == [0, 1]
    bench.engine.dispose()


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


def test_numbers_that_break_down_block_the_round(bench, monkeypatch):
    def broken(*_args, **_kwargs):
        raise NotFinite("the reward model's gradient is not finite")

    monkeypatch.setattr(reward, "fit", broken)
    bench.rate(40)
    assert bench.loop.step()
    assert bench.versions() == [0]
    (row,) = bench.rounds()
    assert row["reason"].startswith("broken: ")
    assert bench.new_feedback(0) == 40


def test_a_store_that_does_not_answer_is_waited_for(bench, monkeypatch):
    answers = iter([StoreUnavailable("the store cannot be read: locked"), True])

    def step():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(bench.loop, "step", step)
    monkeypatch.setattr(bench.loop, "_config", ONE_ROUND)
    bench.loop.run()
    assert any("locked" in line for line in bench.lines)


def _flip_a_bit(folder):
    path = folder / "reward" / artifacts.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _lose_the_critic(folder):
    shutil.rmtree(folder / "value")


def _alter_the_manifest(folder):
    path = folder / artifacts.MANIFEST
    path.write_text(path.read_text().replace('"parent": 0', '"parent": 9'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flip_a_bit, "file_altered"),
        (_lose_the_critic, "file_missing"),
        (_alter_the_manifest, "manifest_altered"),
        (shutil.rmtree, "manifest_missing"),
    ],
)
def test_nothing_is_trained_from_a_version_that_is_not_what_was_published(bench, damage, reason):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    damage(bench.config.state.versions / bench.get(1).folder)
    with pytest.raises(BadPolicyVersion) as raised:
        bench.loop.step()
    assert raised.value.reason == reason
    assert (len(bench.rounds()), bench.versions()) == (1, [0, 1])


def test_nothing_is_trained_from_a_version_of_another_base_model(bench):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    bench.base = bench.base.model_copy(update={"tokenizer_digest": "o" * 64})
    with pytest.raises(BadPolicyVersion, match="wrong_base_model"):
        bench.new_loop().step()
    assert (len(bench.rounds()), bench.versions()) == (1, [0, 1])


def test_nobody_deletes_the_parent_of_a_round_that_is_under_way(bench, monkeypatch):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    folder = bench.config.state.versions / bench.get(1).folder
    claimed: list[bool] = []
    make = probes.make

    def look(*arguments, **options):
        with claim(folder) as is_ours:
            claimed.append(is_ours)
        return make(*arguments, **options)

    monkeypatch.setattr(probes, "make", look)  # the last step before the version is written
    bench.loop.step()
    with claim(folder) as is_ours:
        assert (claimed, is_ours) == ([False], True)


def test_a_round_whose_parent_was_deleted_meanwhile_is_dropped(bench, monkeypatch):
    """Others came and were current between the look into the store and the round's beginning."""
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    read = bench.loop._read

    def late(due):
        data = read(due)
        bench.adopt(0)
        with bench.engine.begin() as connection:
            deployments.collect(connection, "default", 1, at=2.0, reason="")
        artifacts.set_aside(bench.config.state.versions, "default", 1)
        return data

    monkeypatch.setattr(bench.loop, "_read", late)
    assert not bench.loop.step()
    assert "dropped, as version 1 is not current any more" in bench.lines[-1]
    assert (len(bench.rounds()), bench.versions()) == (1, [0, 1])
    assert bench.new_feedback(0) == 80


def test_it_rests_from_the_whole_round_once_the_version_is_published(bench, monkeypatch):
    published: list[int] = []
    monkeypatch.setattr(
        bench.loop._trunk.pace, "rest", lambda: published.append(len(bench.versions()) - 1)
    )
    bench.rate(40)
    assert bench.loop.step()
    assert (published[0], published[-1]) == (0, 1)


@pytest.mark.parametrize(
    ("look_s", "rest_s"), [(2.0, RESTS_PER_LOOK * 2.0), (600.0, LONGEST_REST_S)]
)
def test_a_long_look_into_the_store_is_followed_by_a_longer_rest_up_to_a_limit(
    bench, monkeypatch, look_s, rest_s
):
    now, rests = [0.0], []
    monkeypatch.setattr("trainer.loop.perf_counter", lambda: now[0])

    def look() -> None:
        now[0] += look_s

    class Enough(Exception):
        pass

    def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 3:
            raise Enough

    monkeypatch.setattr(bench.loop, "_due", look)
    monkeypatch.setattr("trainer.loop.sleep", rest)
    with pytest.raises(Enough):
        bench.loop.run()
    assert rests == [rest_s] * 3


@pytest.mark.parametrize("where", ["_due", "_round"])
def test_what_took_long_and_failed_is_tried_again_when_it_was_said(bench, monkeypatch, where):
    """Only looks that found nothing due are followed by long rests."""
    now, rests = [0.0], []
    monkeypatch.setattr("trainer.loop.perf_counter", lambda: now[0])
    bench.rate(40)

    class Enough(Exception):
        pass

    def fail(*_of) -> None:
        if len(rests) >= 2:
            raise Enough
        now[0] += 1000.0
        raise StoreUnavailable("no")

    monkeypatch.setattr(bench.loop, where, fail)
    monkeypatch.setattr("trainer.loop.sleep", rests.append)
    with pytest.raises(Enough):
        bench.loop.run()
    assert max(rests) <= bench.config.round.retry_interval_s
