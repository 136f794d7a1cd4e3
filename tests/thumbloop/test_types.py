import pytest

from tests.rows import candidate, interaction
from thumbloop.types import Sampling


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        (Sampling(8), None),
        (Sampling(8, temperature=0.7, seed=1), None),
        (Sampling(8, temperature=0.0), "greedy"),
        (Sampling(8, top_p=0.99), "truncated_sampling"),
        (Sampling(8, top_k=1), "truncated_sampling"),
        (Sampling(8, stop=("\n",)), "stop_strings"),
    ],
)
def test_only_the_policys_own_distribution_is_trained_on(sampling: Sampling, reason: str | None):
    assert sampling.untrainable_reason == reason


def test_the_chosen_candidate_is_the_one_that_was_shown():
    reply = interaction(candidates=(candidate(0, chosen=False), candidate(1, chosen=True)))
    assert reply.chosen.index == 1
