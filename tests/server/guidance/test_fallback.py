from server.guidance.fallback import most_likely
from tests.rows import candidate
from thumbloop.types import Arm, FinishReason


def test_the_mean_counts_so_long_replies_are_not_at_a_disadvantage():
    short = candidate(0, logprobs=(-1.0,), chosen=False)
    long = candidate(1, logprobs=(-0.5, -0.5, -0.5, -0.5), chosen=False)
    assert most_likely([short, long], "full").chosen.index == 1


def test_an_empty_reply_is_no_accident():
    empty = candidate(0, token_ids=(), logprobs=(), chosen=False)
    assert most_likely([empty], "full").chosen.index == 0


def test_an_aborted_candidate_is_shown_only_where_none_has_finished():
    aborted = candidate(0, logprobs=(-0.1,), finish_reason=FinishReason.ABORTED, chosen=False)
    finished = candidate(1, logprobs=(-3.0,), chosen=False)
    nothing = candidate(
        2, token_ids=(), logprobs=(), finish_reason=FinishReason.ABORTED, chosen=False
    )
    assert most_likely([aborted, finished, nothing], "deadline").chosen.index == 1
    assert most_likely([nothing, aborted], "deadline").chosen.index == 0


def test_it_says_why_and_claims_no_propensity():
    outcome = most_likely([candidate(0), candidate(1)], "late")
    assert (outcome.arm, outcome.reranked, outcome.fallback) == (Arm.FALLBACK, False, "late")
    assert [c.propensity for c in outcome.candidates] == [None, None]
