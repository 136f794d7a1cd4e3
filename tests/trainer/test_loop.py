"""Rounds: what they publish, and what they start from."""

import torch
from sqlalchemy import select, update

from tests.bench import VERDICT, Bench
from thumbloop import artifacts
from thumbloop.config.trainer import Gate, RewardFit, Supervised
from thumbloop.store import preferences, reading, schema
from thumbloop.store.schema import round_inputs
from thumbloop.types import IMPORTED_VERSION
from trainer import reward
from trainer.learning import Lesson
from trainer.ppo import NotFinite


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


def test_preferences_start_a_round_and_are_recorded_apart(tmp_path, tiny_model):
    bench = Bench(tmp_path, tiny_model, gate=Gate(enabled=False))
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


def test_preferences_that_are_turned_off_start_no_round(tmp_path, tiny_model):
    bench = Bench(
        tmp_path,
        tiny_model,
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


def test_with_the_gate_off_whatever_is_finite_is_published(tmp_path, tiny_model):
    bench = Bench(tmp_path, tiny_model, gate=Gate(enabled=False))
    bench.rate(40, shuffled=True)
    assert bench.loop.step()
    assert bench.versions() == [0, 1]
    bench.engine.dispose()


def test_the_supervised_warm_start_comes_first_and_once(tmp_path, tiny_model):
    bench = Bench(tmp_path, tiny_model, supervised=Supervised(enabled=True))
    bench.rate(40)
    bench.loop.step()
    assert bench.get(1).metrics["supervised_loss"] > 0
    assert bench.get(1).metrics["sampler_trainer_kl"] < 1e-6  # of the parent, not of the imitator
    bench.adopt(1)
    bench.rate(40, version=1)
    bench.loop.step()
    assert "supervised_loss" not in bench.get(2).metrics
    bench.engine.dispose()


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


def test_the_trainer_stops_after_the_set_number_of_rounds(tmp_path, tiny_model):
    bench = Bench(tmp_path, tiny_model)
    bench.config = bench.config.model_copy(
        update={"round": bench.config.round.model_copy(update={"max_rounds": 1})}
    )
    bench.rate(40)
    bench.new_loop().run()
    assert bench.versions() == [0, 1]
    bench.engine.dispose()


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
