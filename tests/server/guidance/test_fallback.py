from server.guidance.fallback import most_likely
from tests.rows import candidate


def test_the_mean_counts_so_long_replies_are_not_at_a_disadvantage():
    short = candidate(0, logprobs=(-1.0,), chosen=False)
    long = candidate(1, logprobs=(-0.5, -0.5, -0.5, -0.5), chosen=False)
    assert most_likely([short, long]).chosen.index == 1


def test_an_empty_reply_is_no_accident():
    empty = candidate(0, token_ids=(), logprobs=(), chosen=False)
    assert most_likely([empty]).chosen.index == 0
