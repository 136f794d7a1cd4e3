import pytest
import torch
from rich.console import Console

from tests.rows import version
from tests.trainer.test_loop import Bench
from thumbloop.config import TrainerConfig
from thumbloop.config.shared import RewardComponent
from thumbloop.config.trainer import Gate, Ppo
from trainer import reward
from trainer.batches import collate
from trainer.calibration import Calibration
from trainer.dataset import Dataset
from trainer.metrics import TrainerMetrics
from trainer.policy import PolicyStage
from trainer.rollouts import Rollout, Thumb
from trainer.update import PpoObjective

HANDED_ON = {
    "base_repetition": "parent_repetition",
    "base_unended_share": "parent_unended_share",
    "justified_reply_tokens": "parent_reply_tokens",
    "justified_rate": "parent_rate",
    "justified_rate_error": "parent_rate_error",
}
LENGTH = RewardComponent(kind="length", weight=1.0, scale_tokens=1)
SHARED = {
    "thumbs": RewardComponent(kind="thumbs", weight=0.5),
    "short": LENGTH.model_copy(update={"weight": 0.5}),
}


def said(trunk, *responses: tuple[int, ...]) -> list[Rollout]:
    """Rollouts of the policy; those that do not end with 1 reached their token limit."""
    pairs = [((6 + i, 7), response) for i, response in enumerate(responses)]
    with torch.no_grad():
        logprobs = trunk.respond(collate(pairs), torch.ones(len(pairs), 1), "policy").logprobs
    return [
        Rollout(
            f"reply {i}",
            0,
            prompt,
            response,
            tuple(logprobs[i, : len(response)].tolist()),
            1.0,
            has_eos=response[-1] == 1,
        )
        for i, (prompt, response) in enumerate(pairs)
    ]


def dataset(rollouts: list[Rollout], *ups: bool) -> Dataset:
    """Rollouts, all of which were shown with a probability of a half; the first ones were rated."""
    thumbs = tuple(
        Thumb(i, r.response_id, f"user {i}", up, r.prompt, r.response, propensity=0.5, sample=r)
        for i, (r, up) in enumerate(zip(rollouts, ups, strict=False))
    )
    return Dataset(thumbs, (), thumbs, tuple(rollouts), {})


@pytest.fixture
def stage(trained_trunk, tmp_path) -> PolicyStage:
    metrics = TrainerMetrics(tmp_path, Console(quiet=True))
    objective = PpoObjective(Ppo(learning_rate=1e-4))
    return PolicyStage(trained_trunk, objective, str, TrainerConfig(), metrics)


def test_what_the_first_version_took_from_the_base_model_is_handed_on(
    trained_trunk, stage, generator
):
    plain, stammered = (
        ((8, 9, 10, 1), (8, 9, 8, 9, 1), (11, 1), (12, 13, 14, 15)),
        ((8, 8, 8, 8, 8, 1), (9, 9, 9, 9, 9, 9), (11, 12, 11, 12, 11, 12), (9, 9, 9, 9)),
    )
    parent = version(0, None, metrics={})
    rounds = []
    for number, (responses, ups) in enumerate(
        [
            (plain, (True, False, True, True)),
            (stammered, (False, False, True, False)),
            (stammered, (False, False, False, True)),
        ]
    ):
        data = dataset(said(trained_trunk, *responses), *ups)
        rounds.append(stage.improve(data, parent, Calibration(), generator).metrics)
        parent = version(number + 1, number, metrics=rounds[-1])
    first, second, third = rounds
    for name, of_parent in HANDED_ON.items():
        assert first[name] == first[of_parent]
        assert second[name] == third[name] == first[name]
        assert second[of_parent] != first[of_parent]
    assert first["base_unended_share"] == pytest.approx(1 / 4)
    assert first["base_repetition"] == pytest.approx(1 / 16)  # a quarter of one reply's four pairs
    assert first["justified_reply_tokens"] == pytest.approx(15 / 4)
    assert first["justified_rate"] == pytest.approx(3 / 4)


def test_nothing_is_handed_on_that_was_never_known(trained_trunk, stage, generator):
    """Replies that were never rated tell no rate, and there is none to compare later ones with."""
    rollouts, parent = said(trained_trunk, (8, 9, 1), (10, 1)), version(0, None, metrics={})
    metrics = stage.improve(dataset(rollouts), parent, Calibration(), generator).metrics
    assert HANDED_ON.keys() - metrics.keys() == {"justified_rate", "justified_rate_error"}


def test_the_expected_rate_is_the_mean_of_what_whole_replies_are_said_to_be_worth(
    trained_trunk, stage, generator
):
    rollouts = said(trained_trunk, (8, 9, 10, 1), (11, 12, 1), (13, 1))
    calibration = Calibration(temperature=2.0, offset=0.5, shift=-1.0)
    rewards = reward.score(trained_trunk, [(r.prompt, r.response) for r in rollouts])
    cut = Rollout("cut", 0, (6,), (8, 9), (-1.0, -1.0), 1.0, is_finished=False)
    parent = version(0, None, metrics={})
    metrics = stage.improve(dataset([cut, *rollouts]), parent, calibration, generator).metrics
    expected = (rewards / 2 - 0.5).sigmoid().mean().item()
    assert metrics["parent_predicted_rate"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("rewards", "has_rates"), [(SHARED, True), ({"short": LENGTH}, False)], ids=["thumbs", "none"]
)
def test_a_version_tells_the_thumbs_it_expects_where_thumbs_are_part_of_the_reward(
    tmp_path, tiny_model, rewards, has_rates
):
    bench = Bench(tmp_path, tiny_model, rewards=rewards, gate=Gate(enabled=False))
    bench.rate(40)
    bench.loop.step()
    metrics = bench.get(1).metrics
    assert ("parent_predicted_rate" in metrics) is has_rates
    assert ("child_predicted_rate" in metrics) is has_rates
    if has_rates:
        assert 0 < metrics["parent_predicted_rate"] < metrics["child_predicted_rate"] < 1
    bench.engine.dispose()
