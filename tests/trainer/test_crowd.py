import math

import pytest

from thumbloop.types import User
from trainer.crowd import count_within, most_of_a_batch, most_of_a_user, user_cap


def users(*counts: int) -> dict[User, int]:
    return {User(user_id=f"user {i}"): count for i, count in enumerate(counts)}


def test_the_cap_is_a_share_of_what_is_left_after_capping():
    assert user_cap([8.0, 1.0, 1.0], share=0.5) == pytest.approx(2)  # 2 of 2 + 1 + 1
    assert user_cap([1.0, 1.0, 1.0], share=0.5) >= 1  # nobody is above it


def test_a_user_counts_a_multiple_of_the_average_of_what_counts():
    # 2 * (19 + x) / 20 = x, by hand 38 / 18
    assert most_of_a_user([1] * 19 + [1000], 2) == pytest.approx(38 / 18)
    assert most_of_a_user([4] * 20, 1.5) >= 4
    assert most_of_a_user([1] * 19 + [1000], 1e9) >= 1000


@pytest.mark.parametrize("flood", [10, 10_000])
@pytest.mark.parametrize("attackers", [1, 5, 20])
def test_users_who_agree_have_a_multiple_of_their_share_of_the_users(attackers: int, flood: int):
    totals = [3] * (100 - attackers) + [flood] * attackers
    most = most_of_a_user(totals, 2)
    counted = [min(total, most) for total in totals]
    assert sum(counted[-attackers:]) / sum(counted) <= 2 * attackers / 100 + 1e-9


def test_among_few_users_nobody_is_held_back():
    assert most_of_a_user([1] * 8 + [1000], 2) == math.inf
    assert most_of_a_user([1] * 9 + [1000], 2) < 3
    assert most_of_a_user([], 2) == math.inf


def test_of_a_batch_a_user_has_the_part_that_they_have_of_what_counts():
    # 38 / 18 of 19 + 38 / 18 is a tenth.
    assert most_of_a_batch([1] * 19 + [1000], 2, 50) == pytest.approx(5)
    assert most_of_a_batch([1] * 19 + [1000], 2, 5) == 1
    assert most_of_a_batch([1] * 8 + [1000], 2, 50) == math.inf


def test_everybody_may_say_something():
    assert most_of_a_user([1] * 20, 1) == 1
    assert count_within(users(*[1] * 20), {}, 1.0) == 20


def test_new_feedback_has_room_beside_what_was_given_before():
    new = users(*[1] * 19, 1000)
    assert count_within(new, {}, 2.0) == 19 + 2
    ann = User(user_id="user 19")
    assert count_within(new, {ann: 1}, 2.0) == 19 + 1
    assert count_within(new, {ann: 50}, 2.0) == 19
    assert count_within({ann: 1000}, {}, 2.0) == 1000
    assert count_within({}, {ann: 1000}, 2.0) == 0
