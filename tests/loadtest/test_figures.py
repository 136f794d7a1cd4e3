import pytest

from loadtest.figures import (
    Figure,
    Goal,
    Group,
    gain,
    gain_kept,
    of_repeats,
    ratio,
    share_of,
    table,
)


def test_a_ratio_is_taken_repeat_by_repeat():
    # The machine slowed down in the second repeat, for both: 2, 2 and 3, not 60 / 28.
    assert ratio([20, 10, 30], [10, 5, 10]) == Figure(2, 2, 3)


def test_repeats_give_median_and_range():
    assert of_repeats([3.0, 1.0, 2.0]) == Figure(2.0, 1.0, 3.0)


def test_a_gain_is_what_choosing_brought():
    assert gain([Group(chosen=2.0, mean=0.5), Group(chosen=1.0, mean=0.5)]) == pytest.approx(1.0)


def test_the_kept_gain_is_measured_from_the_full_groups_mean():
    full = [Group(2.0, 0.0), Group(4.0, 2.0)]  # mean 1, chosen 3: a gain of 2
    assert gain_kept(full, [2.0, 3.0]).value == pytest.approx(0.75)  # chosen 2.5: a gain of 1.5


def test_the_same_choices_keep_everything():
    full = [Group(2.0, 0.0), Group(4.0, 2.0), Group(5.0, 1.0)]
    assert gain_kept(full, [2.0, 4.0, 5.0]) == pytest.approx(Figure(1.0, 1.0, 1.0))


def test_a_prompt_without_a_reward_on_one_side_is_left_out_on_both():
    full = [Group(2.0, 0.0), None, Group(4.0, 2.0), Group(9.0, 1.0)]
    shown = [2.0, 7.0, 3.0, None]
    assert gain_kept(full, shown) == gain_kept([Group(2.0, 0.0), Group(4.0, 2.0)], [2.0, 3.0])
    with pytest.raises(ValueError, match="shorter"):
        gain_kept(full, shown[1:])


def test_a_share_of_tokens_is_that_of_their_sums_with_an_interval():
    wide, narrow = [share_of([6, 2, 4] * n, [10, 10, 4] * n) for n in (3, 60)]
    assert wide.value == narrow.value == pytest.approx(0.5)  # 12 of 24, not the mean of shares
    assert wide.low < narrow.low < 0.5 < narrow.high < wide.high
    assert share_of([6, 3], [10, 5]) == pytest.approx(Figure(0.6, 0.6, 0.6))


def test_the_kept_gains_interval_holds_it_and_narrows_with_more_requests():
    few = [Group(2.0 + i % 3, 0.0) for i in range(9)]
    shown = [1.0 + (i + 1) % 3 for i in range(9)]
    narrow, wide = gain_kept(few * 25, shown * 25), gain_kept(few, shown)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


@pytest.mark.parametrize(
    ("goal", "value", "is_met"),
    [(Goal(0.9), 0.9, True), (Goal(0.9), 0.89, False), (Goal(3, is_upper=True), 3.1, False)],
)
def test_a_goal_is_met_or_not(goal: Goal, value: float, is_met: bool):
    assert goal.is_met(Figure(value, value, value)) is is_met


def test_the_table_shows_goals_intervals_and_what_is_short():
    words = table(
        {
            "float32": {"lora.ratio_to_base": Figure(0.88, 0.86, 0.91)},
            "bfloat16": {"lora.ratio_to_base": Figure(0.92, 0.92, 0.92), "extra": Figure(1, 1, 1)},
        },
        {"lora.ratio_to_base": Goal(0.9), "swap.failed": Goal(0, is_upper=True)},
    )
    assert "| `lora.ratio_to_base` | at least 0.9 | 0.88 (0.86 to 0.91) **short** | 0.92 |" in words
    assert "| `swap.failed` | at most 0 | not measured | not measured |" in words
    assert words.splitlines()[-1] == "| `extra` |  | not measured | 1 |"
    assert len(words.splitlines()) == 2 + 2 + 1
