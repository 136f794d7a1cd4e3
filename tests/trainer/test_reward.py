import random
from dataclasses import replace

import pytest
import torch

from thumbloop.config.trainer import RewardFit
from trainer.reward import (
    cross_fitted,
    evidence_on,
    fit,
    score,
    thumb_weights,
    user_cap,
    user_folds,
)
from trainer.rollouts import Thumb

LIKED = 20
FIT = RewardFit(learning_rate=1e-2, batch_size=8, epochs=3)


def thumb(i: int = 0, user: str = "ann", propensity: float | None = None, up: bool = True) -> Thumb:
    return Thumb(i, user, up, (6, 7), (8, 9), propensity)


def thumbs_for_a_token(n: int, seed: int) -> list[Thumb]:
    """Thumbs up for replies that hold the liked token, down for the others."""
    rng = random.Random(seed)
    thumbs = []
    for i in range(n):
        response = [rng.randrange(8, 19) for _ in range(rng.randint(3, 6))]
        if is_liked := rng.random() < 0.5:
            response[rng.randrange(len(response))] = LIKED
        thumbs.append(Thumb(i, f"user {i % 11}", is_liked, (6, 7), tuple(response)))
    return thumbs


def test_a_separable_preference_is_learned_and_shuffled_thumbs_are_not(trunk, generator):
    thumbs = thumbs_for_a_token(96, seed=0)
    ups = [t.is_up for t in thumbs]
    random.Random(1).shuffle(ups)
    shuffled = [replace(t, is_up=up) for t, up in zip(thumbs, ups, strict=True)]
    assert cross_fitted(trunk, shuffled, FIT, generator).lower_bound(0.99) < 0.5
    assert cross_fitted(trunk, thumbs, FIT, generator).lower_bound(0.99) > 0.5


def test_fitting_makes_new_replies_rankable_and_calibrates_the_logit(trunk, generator):
    thumbs = thumbs_for_a_token(96, seed=0)
    unseen = thumbs_for_a_token(200, seed=9)
    assert evidence_on(trunk, unseen).lower_bound(0.99) < 0.9
    fit(trunk, thumbs, torch.ones(96), FIT, generator)
    assert evidence_on(trunk, unseen).auroc > 0.95
    ups = torch.tensor([t.is_up for t in unseen])
    probabilities = score(trunk, unseen).sigmoid()
    assert probabilities[ups].mean() > 0.7 > 0.3 > probabilities[~ups].mean()


def test_cross_fitting_leaves_the_reward_model_as_it_was(trunk, generator):
    thumbs = thumbs_for_a_token(24, seed=0)
    before = score(trunk, thumbs)
    cross_fitted(trunk, thumbs, FIT, generator)
    torch.testing.assert_close(score(trunk, thumbs), before)


def test_fitting_the_reward_model_leaves_the_policy_alone(trained_trunk, generator):
    before = trained_trunk.snapshot("policy")
    fit(trained_trunk, thumbs_for_a_token(16, seed=0), torch.ones(16), FIT, generator)
    for name, parameter in trained_trunk.parameters("policy").items():
        assert torch.equal(parameter, before[name])


def test_a_thumb_of_weight_zero_teaches_nothing(trunk, generator):
    thumbs = thumbs_for_a_token(16, seed=0)
    before = score(trunk, thumbs)
    fit(trunk, thumbs, torch.zeros(16), FIT, generator)
    torch.testing.assert_close(score(trunk, thumbs), before)


def test_scores_do_not_depend_on_company(trained_trunk):
    thumbs = thumbs_for_a_token(40, seed=0)
    torch.testing.assert_close(
        score(trained_trunk, thumbs)[7], score(trained_trunk, [thumbs[7]])[0]
    )


def test_weights_are_inverse_propensities_with_mean_one():
    thumbs = [thumb(0, "ann", 0.5), thumb(1, "bob", 0.25)]
    weights = thumb_weights(thumbs, max_weight=4, max_user_share=1)
    assert weights.tolist() == pytest.approx([2 / 3, 4 / 3])


def test_a_rare_choice_is_clipped():
    thumbs = [thumb(i, f"user {i}", 1.0) for i in range(9)] + [thumb(9, "rare", 0.01)]
    weights = thumb_weights(thumbs, max_weight=2, max_user_share=1)
    # 1 / propensity is 1 nine times and 100 once, 10.9 in the mean: 100 / 10.9 is clipped to 2.
    assert weights.tolist() == pytest.approx([1 / 10.9] * 9 + [2])


def test_a_thumb_without_propensity_claims_no_correction():
    thumbs = [thumb(0, "ann", 0.5), thumb(1, "bob", 0.5), thumb(2, "eve", None)]
    assert thumb_weights(thumbs, max_weight=4, max_user_share=1).tolist() == pytest.approx([1] * 3)


def test_no_user_weighs_more_than_the_share():
    thumbs = [thumb(i, "loud") for i in range(50)] + [thumb(i, f"user {i}") for i in range(50)]
    weights = thumb_weights(thumbs, max_weight=4, max_user_share=0.1)
    assert (weights[:50].sum() / weights.sum()).item() == pytest.approx(0.1)
    assert weights[50:].tolist() == pytest.approx([1] * 50)


def test_users_too_few_for_the_share_weigh_the_same():
    thumbs = [thumb(0, "ann"), thumb(1, "ann"), thumb(2, "ann"), thumb(3, "bob")]
    weights = thumb_weights(thumbs, max_weight=4, max_user_share=0.1)
    assert weights[:3].sum().item() == pytest.approx(weights[3].item())
    assert thumb_weights([thumb()], max_weight=4, max_user_share=0.1).tolist() == [1]


def test_the_cap_is_a_share_of_what_is_left_after_capping():
    assert user_cap([8.0, 1.0, 1.0], share=0.5) == pytest.approx(2)  # 2 of 2 + 1 + 1
    assert user_cap([1.0, 1.0, 1.0], share=0.5) >= 1  # nobody is above it


def test_folds_keep_users_whole_and_deal_out_a_lonely_one():
    thumbs = [thumb(i, f"user {i % 7}") for i in range(28)]
    folds = user_folds(thumbs)
    of_user = {t.user: {f for u, f in zip(thumbs, folds, strict=True) if u == t} for t in thumbs}
    assert all(len(fold) == 1 for fold in of_user.values())
    assert set(folds) == {0, 1, 2, 3}
    assert user_folds([thumb(i) for i in range(4)]) == [0, 1, 2, 3]
