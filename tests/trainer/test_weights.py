import pytest

from thumbloop.config.trainer import RewardFit
from trainer.rollouts import Comparison, Thumb
from trainer.weights import weigh


def thumb(i: int = 0, user: str = "ann", propensity: float | None = None) -> Thumb:
    return Thumb(i, f"reply {i}", user, True, (6, 7), (8, 9), propensity)


def comparison(i: int = 0, user: str = "ann") -> Comparison:
    return Comparison(i, f"reply {i}", user, (6, 7), (8, 9), (8, 8))


def test_weights_are_inverse_propensities_with_mean_one():
    thumbs = [thumb(0, "ann", 0.5), thumb(1, "bob", 0.25)]
    weights = weigh(thumbs, RewardFit(max_weight=4, max_user_share=1))
    assert weights.tolist() == pytest.approx([2 / 3, 4 / 3])


def test_a_rare_choice_is_clipped():
    thumbs = [thumb(i, f"user {i}", 1.0) for i in range(9)] + [thumb(9, "rare", 0.01)]
    weights = weigh(thumbs, RewardFit(max_weight=2, max_user_share=1))
    # 1 / propensity is 1 nine times and 100 once, 10.9 in the mean: 100 / 10.9 is clipped to 2.
    assert weights.tolist() == pytest.approx([1 / 10.9] * 9 + [2])


def test_a_thumb_without_propensity_claims_no_correction():
    thumbs = [thumb(0, "ann", 0.5), thumb(1, "bob", 0.5), thumb(2, "eve", None)]
    assert weigh(thumbs, RewardFit(max_weight=4, max_user_share=1)).tolist() == pytest.approx(
        [1] * 3
    )


def test_no_user_weighs_more_than_the_share():
    thumbs = [thumb(i, "loud") for i in range(50)] + [thumb(i, f"user {i}") for i in range(50)]
    weights = weigh(thumbs, RewardFit(max_weight=4, max_user_share=0.1, max_user_factor=1e9))
    assert (weights[:50].sum() / weights.sum()).item() == pytest.approx(0.1)
    assert weights[50:].tolist() == pytest.approx([1] * 50)


def test_users_too_few_for_the_share_weigh_the_same():
    thumbs = [thumb(0, "ann"), thumb(1, "ann"), thumb(2, "ann"), thumb(3, "bob")]
    weights = weigh(thumbs, RewardFit(max_weight=4, max_user_share=0.1))
    assert weights[:3].sum().item() == pytest.approx(weights[3].item())
    assert weigh([thumb()], RewardFit(max_weight=4, max_user_share=0.1)).tolist() == [1]


def test_without_propensity_weights_all_thumbs_count_alike():
    thumbs = [thumb(0, "ann", 0.5), thumb(1, "bob", 0.25)]
    settings = RewardFit(propensity_weights=False, max_user_share=1)
    assert weigh(thumbs, settings).tolist() == [1, 1]


def test_a_comparison_has_a_weight_of_its_own_and_counts_for_its_user():
    judged = [thumb(0, "ann", 0.5), comparison(0, "bob"), comparison(1, "bob")]
    settings = RewardFit(preference_weight=0.25, max_user_share=1)
    assert weigh(judged, settings).tolist() == pytest.approx([1, 0.25, 0.25])
    capped = weigh([thumb(0, "ann"), *(comparison(i, "bob") for i in range(4))], RewardFit())
    assert capped[1:].sum().item() == pytest.approx(capped[0].item())


def test_preferences_may_be_turned_off():
    judged = [thumb(0, "ann"), comparison(0, "bob")]
    assert weigh(judged, RewardFit(preference_weight=0, max_user_share=1)).tolist() == [1, 0]
    assert weigh([comparison()], RewardFit(preference_weight=0)).tolist() == [0]
    few = [*(thumb(i, f"user {i % 4}") for i in range(8)), comparison(0, "eve")]
    assert weigh(few, RewardFit(preference_weight=0)).tolist() == pytest.approx([1] * 8 + [0])


def test_nothing_has_no_weight():
    assert weigh([], RewardFit()).tolist() == []


def test_who_gave_more_than_others_weighs_less_over_all_that_is_known():
    known = [thumb(i, f"user {i}") for i in range(19)] + [thumb(i, "loud") for i in range(100)]
    drawn = [*known[:5], *known[19:21]]
    weights = weigh(drawn, RewardFit(max_user_factor=2, max_user_share=1), known)
    # 2 * (19 + x) / 20 = x, by hand 38 / 18: each of a hundred weighs a hundredth of it.
    assert weights.tolist() == pytest.approx([1] * 5 + [0.38 / 18] * 2)
    alone = weigh(drawn, RewardFit(max_user_factor=2, max_user_share=1))
    assert alone.tolist() == pytest.approx([1] * 7)  # six users: nobody is held back


def test_users_who_agree_have_little_more_than_their_share_of_the_weight():
    honest = [thumb(i, f"user {i % 57}") for i in range(4 * 57)]
    known = honest + [thumb(i, f"attacker {i % 3}") for i in range(600)]
    weights = weigh(known, RewardFit(max_user_share=1), known)
    assert weights[len(honest) :].sum() / weights.sum() <= 1.25 * 3 / 60 + 1e-6
