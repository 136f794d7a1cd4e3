"""What guards see in a reply: worked by hand."""

import math

import pytest

from server.guards import divergence, is_refusal, repetition, saturated
from thumbloop.config.delivery import Guards


def test_a_typical_length_is_in_the_middle():
    assert saturated(20, 20) == 0.5
    assert saturated(40, 20) == pytest.approx(2 / 3)
    assert saturated(0, 20) == 0
    assert saturated(1e9, 20) < 1


@pytest.mark.parametrize(
    ("token_ids", "share"),
    [
        ((), 0.0),
        ((1, 2, 3), 0.0),
        ((1, 2, 3, 4, 5), 0.0),
        ((1, 2, 3, 4, 1, 2, 3, 4), 0.2),  # of five 4-grams one came before
        ((7,) * 12, 8 / 9),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_came_before(token_ids, share):
    assert repetition(token_ids) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("  Sorry, no.", True),
        ("i cannot do this", True),
        ("As an AI language model, I", True),
        ("The film was good. I'm sorry I missed the start.", False),
        ("I can help.", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_how_it_begins(text: str, refuses: bool):
    assert is_refusal(text, Guards().refusal_pattern) is refuses


def test_divergence_is_what_was_promised_and_did_not_come():
    assert divergence(0.0, 1) == 0.25
    assert divergence(0.0, 0) == 0.75
    assert divergence(math.log(3), 0) == pytest.approx(0.875)
    assert divergence(1e6, 0) == 1
    assert divergence(-1e6, 1) == 0
