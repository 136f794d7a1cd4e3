import dataclasses

import pytest
import torch

from tests.trainer.conftest import VERDICT
from thumbloop.config.shared import RewardComponent
from trainer import reward
from trainer.calibration import Calibration
from trainer.components import forged, logged, mix, rewards_of
from trainer.rollouts import Rollout

THUMBS = RewardComponent(kind="thumbs", weight=0.5)
SHORT = RewardComponent(kind="length", weight=0.25, target_tokens=2, scale_tokens=4)
FORMAT = RewardComponent(kind="format", weight=0.25, pattern="[a-z ]+")
SAFETY = RewardComponent(kind="classifier", weight=0.25, path="somewhere")


def rollout(*response: int, **components: float) -> Rollout:
    return Rollout("r", 1, (6, 7), response, (-1.0,) * len(response), 1.0, components=components)


def decode(token_ids) -> str:
    return "ok" if 9 in token_ids else "NO"


NOTHING_TO_CORRECT = Calibration()


def found(trunk, rollouts, calibration=NOTHING_TO_CORRECT, **components):
    return rewards_of(trunk, rollouts, components, calibration, decode)


def test_each_component_by_hand(trunk):
    rollouts = [rollout(8, 9, safe=0.5), rollout(8, 8, 8, 8, 8, 8, safe=-2.0)]
    rewards = found(trunk, rollouts, short=SHORT, form=FORMAT, safe=SAFETY)
    assert rewards["short"].tolist() == [0.0, -1.0]
    assert rewards["form"].tolist() == [0.0, -1.0]
    assert rewards["safe"].tolist() == [0.5, -2.0]
    components = {"short": SHORT, "form": FORMAT, "safe": SAFETY}
    mixed = mix(rewards, components, forged(trunk, rollouts))
    assert mixed.tolist() == pytest.approx([0.125, -1.0])


def test_thumbs_are_the_models_own_read_by_its_calibration(trained_trunk):
    rollouts = [rollout(8, 9), rollout(10, 11, 12)]
    raw = reward.score(trained_trunk, [(r.prompt, r.response) for r in rollouts])
    plain = found(trained_trunk, rollouts, thumbs=THUMBS)["thumbs"]
    torch.testing.assert_close(plain, raw)
    read = found(trained_trunk, rollouts, Calibration(2.0, 0.5, 0.25), thumbs=THUMBS)["thumbs"]
    torch.testing.assert_close(read, raw / 2 + 0.75)


def test_a_forged_verdict_gets_the_lowest_reward_of_the_mixture(trained_trunk):
    rollouts = [rollout(8, 9), rollout(9, VERDICT.up), rollout(*[10] * 60)]
    components = {"thumbs": THUMBS, "short": SHORT, "form": FORMAT}
    rewards = found(trained_trunk, rollouts, **components)
    rewards["thumbs"] = torch.tensor([0.0, 9.0, 0.0])  # what a model made of the forgery
    mixed = mix(rewards, components, forged(trained_trunk, rollouts))
    assert mixed[1] == mixed[2] == mixed.min() < mixed[0]


def test_a_classifier_says_nothing_of_a_reply_that_was_cut_short(trunk):
    cut = dataclasses.replace(rollout(8, 9), is_finished=False)
    assert found(trunk, [cut, rollout(8, safe=0.5)], safe=SAFETY)["safe"].tolist() == [0.0, 0.5]


def test_only_a_classifier_has_to_be_logged():
    assert logged({"thumbs": THUMBS, "short": SHORT, "form": FORMAT, "safe": SAFETY}) == {"safe"}
