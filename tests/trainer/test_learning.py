import dataclasses
import math

import pytest
import torch
from rich.console import Console

from tests.rows import version
from tests.trainer.test_loop import Bench
from thumbloop import artifacts
from thumbloop.artifacts import BaseModelIdentity
from thumbloop.config import TrainerConfig
from thumbloop.config.shared import RewardComponent
from thumbloop.config.trainer import Gate, Ppo, RewardFit, Supervised
from trainer import policy, reward
from trainer.calibration import Calibration
from trainer.dataset import Dataset
from trainer.learning import Learner, describe_claims, draw_replay
from trainer.metrics import TrainerMetrics
from trainer.reward import Trial
from trainer.rollouts import Thumb

LENIENT = Gate(error_rate=0.2, max_length_drift=9.0)
EAGER = Ppo(minibatch_size=16, epochs=4)
AGAINST_THE_USERS = {"plain": RewardComponent(kind="format", weight=1.0, pattern=r"(?!.*\b20\b).*")}
"""A reward for replies without the token that users like."""


@pytest.fixture
def new_bench(tmp_path, tiny_model):
    """Return a function that makes a bench with these settings."""
    made = []

    def new(**settings) -> Bench:
        made.append(Bench(tmp_path, tiny_model, **settings))
        return made[0]

    yield new
    made[0].engine.dispose()


def changed(bench: Bench, **sections) -> Bench:
    """Go on with other settings, as a trainer that was started again."""
    bench.config = bench.config.model_copy(update=sections)
    bench.loop = bench.new_loop()
    return bench


def assert_blocked(bench: Bench, *reasons: str) -> None:
    """Make sure that the last round published nothing, for these reasons alone, and gave its thumbs back."""
    row = bench.rounds()[-1]
    given = row["reason"].split("; ")
    assert len(given) == len(reasons)
    assert all(g.startswith(r) for g, r in zip(given, reasons, strict=True)), given
    assert row["version"] is None
    assert row["parent"] in bench.versions()
    assert len(bench.versions()) == 1 + row["parent"]
    assert bench.new_feedback(row["parent"]) == 40


@pytest.mark.parametrize(
    ("reasons", "settings"),
    [
        (["kl: "], {"gate": LENIENT.model_copy(update={"max_kl": 1e-9})}),
        (["update_norm: "], {"gate": LENIENT.model_copy(update={"max_update_norm": 1e-9})}),
        (
            ["harm: snips", "harm: dr"],
            {"gate": LENIENT, "rewards": AGAINST_THE_USERS, "ppo": EAGER},
        ),
        (
            ["entropy: "],
            {
                "gate": LENIENT.model_copy(update={"min_entropy_share": 0.95}),
                "supervised": Supervised(enabled=True, learning_rate=1e-2, epochs=10),
            },
        ),
        (
            ["length: "],
            {"gate": Gate(error_rate=0.2, max_length_drift=1.01, length_confidence=0.999)},
        ),
    ],
    ids=["kl", "norm", "harm", "entropy", "length"],
)
def test_each_check_of_the_child_can_block_a_round(new_bench, reasons, settings):
    bench = new_bench(**settings)
    bench.rate(40)
    assert bench.loop.step()
    assert_blocked(bench, *reasons)
    numbers = bench.rounds()[-1]["metrics"]
    if reasons == ["length: "]:  # what was not let is not what later drift is from
        assert numbers["justified_reply_tokens"] == numbers["parent_reply_tokens"]


def test_a_policy_that_is_no_number_blocks_the_round_though_the_gate_is_off(new_bench):
    bench = changed(
        new_bench(gate=Gate(enabled=False)), ppo=Ppo(minibatch_size=16, learning_rate=1e30)
    )
    bench.rate(40)
    assert bench.loop.step()
    (row,) = bench.rounds()
    assert "not_finite: kl_to_reference is nan" in row["reason"].split("; ")
    assert bench.versions() == [0]
    assert bench.new_feedback(0) == 40


def test_a_fit_that_went_astray_blocks_the_round(new_bench):
    bench = new_bench()
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    changed(bench, reward=RewardFit(learning_rate=3.0))
    assert bench.loop.step()
    assert_blocked(bench, "fit: ")


def test_a_reward_model_without_a_gradient_blocks_the_round(new_bench):
    bench = new_bench(reward=RewardFit(learning_rate=1e30))
    bench.rate(40)
    assert bench.loop.step()
    assert_blocked(bench, "broken: the reward model's gradient is not finite")
    assert bench.rounds()[0]["metrics"]["feedback_used"] == 40


def test_a_policy_that_disagrees_with_itself_blocks_the_round(new_bench, monkeypatch):
    def measure_wrongly(*arguments):
        fixed = measure(*arguments)
        return fixed._replace(prox_logprobs=fixed.prox_logprobs + 0.1)

    bench, measure = new_bench(), policy.measure
    monkeypatch.setattr(policy, "measure", measure_wrongly)
    bench.rate(40)
    assert bench.loop.step()
    assert_blocked(bench, "broken: the first ratio is off by 0.1 nats")


def test_a_round_starts_from_both_of_its_parents_adapters(new_bench):
    bench = new_bench(gate=Gate(enabled=False))
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    standing_still = 1e-30
    changed(
        bench,
        reward=RewardFit(learning_rate=standing_still),
        ppo=Ppo(learning_rate=standing_still),
    )
    bench.loop.step()
    parent, child = bench.get(1), bench.get(2)
    assert child.reward_digest == parent.reward_digest
    assert child.policy_digest == parent.policy_digest


def test_a_version_tells_how_good_its_reward_model_is_and_how_to_read_it(new_bench):
    bench = new_bench(reward=RewardFit(learning_rate=1e-2, epochs=3, class_balance=True))
    bench.rate(40)
    bench.loop.step()
    child = bench.get(1)
    manifest = artifacts.read_manifest(bench.config.state.versions / child.folder)
    names = [
        "reward_auroc",
        "reward_auroc_bound",
        "reward_auroc_precision",
        "reward_auroc_latest",
        "reward_auroc_new_users",
        "reward_auroc_fitted",
        "reward_calibration_error",
        "reward_calibration_noise",
        "reward_loss",
        "reward_temperature",
        "reward_offset",
        "reward_shift",
    ]
    assert all(math.isfinite(manifest.metrics[name]) for name in names)
    assert {name: child.metrics[name] for name in names} == {
        name: manifest.metrics[name] for name in names
    }
    assert child.metrics["reward_temperature"] != 1
    assert child.metrics["reward_shift"] != 0


def test_replies_that_drifted_and_were_let_are_what_later_drift_is_from(new_bench):
    bench = new_bench(gate=Gate(enabled=False, max_length_drift=1 + 1e-6))
    bench.rate(40)
    bench.loop.step()
    metrics = bench.get(1).metrics
    for name in ("reply_tokens", "rate", "rate_error"):
        assert metrics[f"justified_{name}"] == metrics[f"child_{name}"] != metrics[f"parent_{name}"]


def thumb(number: int, *, is_up: bool = True, **changes) -> Thumb:
    """A thumb of a user of its own, on a reply of its own."""
    fields = {"user": f"user {number}", "prompt": (6, 7), "response": (8 + number, 9)} | changes
    return Thumb(number, f"reply {number}", is_up=is_up, **fields)


def dataset(new, older=()) -> Dataset:
    return Dataset(tuple(new), tuple(older), (), (), {})


@pytest.fixture
def learn_reward(trained_trunk, generator, tmp_path):
    """Return a function that learns a dataset's feedback on a version that has a reward model."""

    def learn(data: Dataset, **settings):
        config = TrainerConfig(reward=RewardFit(**settings))
        metrics = TrainerMetrics(tmp_path, Console(quiet=True))
        base = BaseModelIdentity(digest="", tokenizer_digest="")
        learner = Learner(trained_trunk, None, base, config, metrics)
        parent = version(1, metrics={"reward_auroc": 0.5})
        return learner.learn_reward(data, parent, generator, look=1)

    return learn


def test_feedback_that_the_parent_was_fitted_on_is_no_evidence(trained_trunk, learn_reward):
    plain = [thumb(i) for i in range(16)]
    rewards = reward.score(trained_trunk, [(t.prompt, t.response) for t in plain])
    is_high = rewards > rewards.median()
    # The parent ranks what it has not seen perfectly, and what it has seen upside down.
    judged = [
        dataclasses.replace(t, is_up=bool(is_high[i]) is (i % 2 == 0), is_seen=i % 2 == 1)
        for i, t in enumerate(plain)
    ]
    assert learn_reward(dataset(judged)).metrics["reward_auroc_latest"] == 1
    unseen = [dataclasses.replace(t, is_seen=False) for t in judged]
    assert learn_reward(dataset(unseen)).metrics["reward_auroc_latest"] < 0.9


def test_a_fit_that_nothing_was_held_out_from_is_still_put_on_its_mean(learn_reward):
    """All thumbs are up, and of replies that the parent knows: no claim was tried, but the shift is."""
    metrics = learn_reward(dataset(thumb(i, is_seen=True) for i in range(8))).metrics
    assert metrics["reward_shift"] > 0.1
    assert metrics["reward_temperature"] == 1
    assert "reward_calibration_error" not in metrics


@pytest.mark.parametrize(
    ("share", "replayed"), [(0.0, 0), (0.5, 2), (0.8, 3), (1.0, 4), (2.0, 8), (5.0, 10)]
)
def test_older_feedback_is_replayed_by_its_share_of_the_new(learn_reward, share, replayed):
    ups = [thumb(i) for i in range(4)]
    downs = [thumb(i, is_up=False) for i in range(4, 14)]
    learned = learn_reward(
        dataset(ups, downs), replay_share=share, class_balance=True, max_user_share=1.0
    )
    assert len(learned.replayed) == len(set(learned.replayed)) == replayed
    assert set(learned.replayed) <= set(downs)
    # The fit saw both: its offset is their log-odds, one imagined thumb of each kind added.
    assert learned.metrics["reward_offset"] == pytest.approx(math.log(5 / (replayed + 1)))


def test_what_is_replayed_is_drawn_anew_and_comes_oldest_first():
    data = dataset([thumb(i) for i in range(5)], [thumb(i) for i in range(5, 20)])
    drawn = [draw_replay(data, 1.0, torch.Generator().manual_seed(seed)) for seed in range(9)]
    numbers = [[t.feedback_id for t in each] for each in drawn]
    assert all(each == sorted(each) for each in numbers)
    assert {n for each in numbers for n in each} == set(range(5, 20))


def test_claims_are_judged_as_they_were_made_and_unknown_users_apart():
    sure = math.log(4)  # a probability of 0.8
    thumbs = (thumb(1), thumb(2, is_up=False), thumb(3, is_up=False, user="known"))
    trial = Trial(thumbs, rewards=(0.0, -4 * sure, 0.0), offset=sure)
    found = describe_claims(
        [trial], dataset(thumbs, [thumb(4, user="known")]), Calibration(temperature=2.0)
    )
    assert found["reward_auroc_new_users"] == 1  # 0.75 of all
    assert found["reward_calibration_error"] == pytest.approx((0.2 + 0.2 + 0.8) / 3)
    assert found["reward_calibration_noise"] == pytest.approx(0.4 * math.sqrt(2 / math.pi))
