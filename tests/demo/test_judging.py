import pytest

from demo.judging import Judged, columns, judge


def test_liked_replies_in_broken_words_are_not_both():
    formed = "I loved the repair service from Otto's Company."
    prompts = ["How was the pasta?"] * 4
    found = judge("praise", prompts, [formed, "wonderful wonderful", formed, "the of"])
    assert found == Judged(liked=0.75, well_formed=0.5, both=0.5)


def test_what_was_found_is_told_by_name():
    judged = [Judged(0.1, 0.2, 0.3), Judged(0.4, 0.5, 0.6)]
    assert columns(judged) == {"liked": [0.1, 0.4], "well_formed": [0.2, 0.5], "both": [0.3, 0.6]}


def test_a_preference_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="unknown preference"):
        judge("loudness", ["a"], ["b"])
