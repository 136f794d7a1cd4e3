import random
from dataclasses import replace

import pytest
import torch

from thumbloop.config.trainer import RewardFit
from trainer.evidence import pool_folds
from trainer.reward import (
    Trial,
    balance,
    cross_fit,
    fit,
    loss_of,
    replies_of,
    score,
    try_on,
    user_folds,
)
from trainer.rollouts import Comparison, Thumb

LIKED = 20
FIT = RewardFit(learning_rate=1e-2, batch_size=8, epochs=3)


def thumb(i: int = 0, user: str = "ann", propensity: float | None = None, up: bool = True) -> Thumb:
    return Thumb(i, f"reply {i}", user, up, (6, 7), (8, 9), propensity)


def thumbs_for_a_token(n: int, seed: int) -> list[Thumb]:
    """Thumbs up for replies that hold the liked token, down for the others."""
    rng = random.Random(seed)
    thumbs = []
    for i in range(n):
        response = [rng.randrange(8, 19) for _ in range(rng.randint(3, 6))]
        if is_liked := rng.random() < 0.5:
            response[rng.randrange(len(response))] = LIKED
        thumbs.append(Thumb(i, f"reply {i}", f"user {i % 11}", is_liked, (6, 7), tuple(response)))
    return thumbs


def cross_fitted(trunk, thumbs, generator):
    return pool_folds([t.evidence for t in cross_fit(trunk, thumbs, FIT, generator)])


def test_a_separable_preference_is_learned_and_shuffled_thumbs_are_not(trunk, generator):
    thumbs = thumbs_for_a_token(96, seed=0)
    ups = [t.is_up for t in thumbs]
    random.Random(1).shuffle(ups)
    shuffled = [replace(t, is_up=up) for t, up in zip(thumbs, ups, strict=True)]
    assert cross_fitted(trunk, shuffled, generator).lower_bound(0.99) < 0.5
    assert cross_fitted(trunk, thumbs, generator).lower_bound(0.99) > 0.5


def test_fitting_makes_new_replies_rankable_and_calibrates_the_logit(trunk, generator):
    thumbs = thumbs_for_a_token(96, seed=0)
    unseen = thumbs_for_a_token(200, seed=9)
    assert try_on(trunk, unseen).evidence.lower_bound(0.99) < 0.9
    fit(trunk, thumbs, FIT, generator)
    assert try_on(trunk, unseen).evidence.auroc > 0.95
    ups = torch.tensor([t.is_up for t in unseen])
    probabilities = score(trunk, replies_of(unseen)).sigmoid()
    assert probabilities[ups].mean() > 0.7 > 0.3 > probabilities[~ups].mean()


def test_cross_fitting_leaves_the_reward_model_as_it_was(trunk, generator):
    thumbs = thumbs_for_a_token(24, seed=0)
    before = score(trunk, replies_of(thumbs))
    cross_fit(trunk, thumbs, FIT, generator)
    torch.testing.assert_close(score(trunk, replies_of(thumbs)), before)


def test_fitting_the_reward_model_leaves_the_policy_alone(trained_trunk, generator):
    before = trained_trunk.snapshot("policy")
    fit(trained_trunk, thumbs_for_a_token(16, seed=0), FIT, generator)
    for name, parameter in trained_trunk.parameters("policy").items():
        assert torch.equal(parameter, before[name])


def comparisons_for_a_token(n: int, seed: int) -> list[Comparison]:
    """Pairs of which the one that holds the liked token was found better."""
    thumbs = thumbs_for_a_token(8 * n, seed)
    better, worse = ([t for t in thumbs if t.is_up is up][:n] for up in (True, False))
    return [
        Comparison(i, f"reply {i}", f"user {i % 11}", b.prompt, b.response, w.response)
        for i, (b, w) in enumerate(zip(better, worse, strict=True))
    ]


def test_comparisons_teach_what_thumbs_teach(trunk, generator):
    fit(trunk, comparisons_for_a_token(64, seed=0), FIT, generator)
    assert try_on(trunk, thumbs_for_a_token(200, seed=9)).evidence.auroc > 0.9
    evidence = try_on(trunk, comparisons_for_a_token(20, seed=9)).evidence
    assert evidence.auroc > 0.9
    assert evidence.precision == pytest.approx(80)  # 20 fair coins: a variance of 1 / 80


def test_a_comparison_beside_a_thumb_on_the_same_reply_is_no_evidence_of_its_own():
    thumbs = tuple(thumb(i, up=i % 2 == 0) for i in range(6))
    pairs = [Comparison(i, f"reply {i}", "ann", (6,), (8,), (9,)) for i in range(8)]
    alone = Trial(thumbs, (1.0,) * 6, tuple(pairs[6:]), (1.0, 1.0)).evidence
    beside = Trial(thumbs, (1.0,) * 6, tuple(pairs), (-1.0,) * 6 + (1.0, 1.0)).evidence
    assert beside == alone
    assert alone.precision == pytest.approx(12 * 9 / 7 + 8)


def test_comparisons_without_weight_teach_nothing(trunk, generator):
    pairs = comparisons_for_a_token(16, seed=0)
    before = score(trunk, replies_of(pairs))
    fit(trunk, pairs, FIT.model_copy(update={"preference_weight": 0.0}), generator)
    torch.testing.assert_close(score(trunk, replies_of(pairs)), before)


def test_the_loss_of_each_kind_by_hand():
    judged = [thumb(up=True), Comparison(0, "reply", "ann", (6,), (8,), (9,)), thumb(up=False)]
    rewards = torch.tensor([2.0, 1.0, 3.0, -1.0])  # up; better, worse; down
    losses = loss_of(judged, rewards, offset=0.5)
    # -log sigmoid(2.5), -log sigmoid(1 - 3), -log(1 - sigmoid(-0.5))
    assert losses.tolist() == pytest.approx([0.078889, 2.126928, 0.474077], abs=1e-6)


def test_the_offset_is_the_weighted_log_odds_of_a_thumb_up():
    judged = [
        thumb(up=True),
        thumb(up=True),
        thumb(up=False),
        Comparison(0, "reply", "ann", (6,), (8,), (9,)),
    ]
    offset = balance(judged, torch.tensor([2.0, 2.0, 1.5, 9.0]))
    assert offset == pytest.approx(0.693147, abs=1e-6)  # log of (4 + 1) / (1.5 + 1)


def test_under_an_offset_a_thumb_that_everybody_gives_teaches_little():
    rewards = torch.zeros(2, requires_grad=True)
    loss_of([thumb(up=True), thumb(up=False)], rewards, offset=3.0).sum().backward()
    # -sigmoid(-3) for the one that was to be expected, sigmoid(3) for the other.
    assert rewards.grad.tolist() == pytest.approx([-0.047426, 0.952574], abs=1e-6)


@pytest.mark.parametrize("is_balanced", [True, False])
def test_the_offset_is_the_fits_where_classes_are_balanced(trunk, generator, is_balanced):
    thumbs = [replace(t, is_up=i % 4 > 0) for i, t in enumerate(thumbs_for_a_token(16, seed=0))]
    fitted = fit(trunk, thumbs, FIT.model_copy(update={"class_balance": is_balanced}), generator)
    assert (fitted.offset > 0.5) is is_balanced  # 12 of 16 are up


def test_scores_do_not_depend_on_company(trained_trunk):
    thumbs = thumbs_for_a_token(40, seed=0)
    torch.testing.assert_close(
        score(trained_trunk, replies_of(thumbs))[7],
        score(trained_trunk, replies_of([thumbs[7]]))[0],
    )


def test_folds_keep_users_whole_and_deal_out_a_lonely_one():
    thumbs = [thumb(i, f"user {i % 7}") for i in range(28)]
    folds = user_folds(thumbs)
    of_user = {t.user: {f for u, f in zip(thumbs, folds, strict=True) if u == t} for t in thumbs}
    assert all(len(fold) == 1 for fold in of_user.values())
    assert set(folds) == {0, 1, 2, 3}
    assert user_folds([thumb(i) for i in range(4)]) == [0, 1, 2, 3]


def test_what_a_lonely_user_said_of_one_reply_stays_together():
    pairs = [Comparison(i, f"reply {i // 2}", "ann", (6,), (8,), (9,)) for i in range(8)]
    assert user_folds(pairs) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert user_folds([thumb(0), replace(pairs[0], response_id="reply 0")]) == [0, 0]
