import random

import numpy as np
import pytest

from trainer.evidence import Evidence, held_out_auroc, ordered_right, pool, pool_folds


def test_auroc_counts_the_pairs_ranked_right_with_ties_as_half():
    # Ups at 3 and 1, downs at 2 and 1: pairs (3,2) (3,1) right, (1,2) wrong, (1,1) tied.
    evidence = held_out_auroc([3.0, 1.0, 2.0, 1.0], [True, True, False, False])
    assert evidence.auroc == pytest.approx(2.5 / 4)
    assert evidence.precision == pytest.approx(48 / 5)


def test_thumbs_of_one_kind_are_no_evidence():
    evidence = held_out_auroc([1.0, 2.0], [True, True])
    assert evidence == Evidence()
    assert (evidence.lower_bound(0.95), evidence.upper_bound(0.95)) == (0.0, 1.0)


def test_a_perfect_ranking_of_four_thumbs_proves_nothing():
    assert held_out_auroc([4, 3, 2, 1], [True, True, False, False]).lower_bound(0.95) < 0.5


def test_scores_that_know_nothing_pass_about_as_often_as_the_level_says():
    rng = random.Random(0)
    passes = sum(
        held_out_auroc(
            [rng.random() for _ in range(64)], [rng.random() < 0.4 for _ in range(64)]
        ).lower_bound(0.95)
        > 0.5
        for _ in range(2000)
    )
    assert 0.035 < passes / 2000 < 0.065


def test_pooling_weighs_by_precision_and_never_compares_across_parts():
    # Inside each part the ranking is random; the second part's scores are far above the first's.
    low = held_out_auroc([0.1, 0.2, 0.3, 0.4], [True, False, False, True])
    high = held_out_auroc([9.1, 9.2, 9.3, 9.4], [True, False, True, True])
    pooled = pool([low, high])
    assert low.auroc == pytest.approx(0.5)
    # Precisions: 12 * 4 / 5 and 12 * 3 / 5.
    assert pooled.precision == pytest.approx(16.8)
    assert pooled.auroc == pytest.approx((4 * 0.5 + 3 * high.auroc) / 7)


def test_comparisons_weigh_beside_thumbs_by_what_they_prove():
    thumbs = held_out_auroc(list(range(64)), [i % 2 == 0 for i in range(64)])
    comparisons = ordered_right([1.0] * 50, [str(i) for i in range(50)])
    pooled = pool([thumbs, comparisons])  # precisions 189 and 200
    assert pooled.precision == pytest.approx(389, abs=1)
    assert pooled.auroc == pytest.approx((189 * thumbs.auroc + 200) / 389, abs=1e-3)


def test_more_of_the_same_evidence_narrows_the_bound():
    part = held_out_auroc([1, 2, 3, 4, 5, 6], [False, False, True, False, True, True])
    assert pool([part, part]).auroc == pytest.approx(part.auroc)
    assert pool([part, part]).lower_bound(0.95) > part.lower_bound(0.95)


def test_the_bounds_lie_around_the_estimate():
    evidence = Evidence(0.7, 100.0)
    assert evidence.lower_bound(0.975) == pytest.approx(0.7 - 0.196, abs=1e-3)
    assert evidence.upper_bound(0.975) == pytest.approx(0.7 + 0.196, abs=1e-3)


def test_nothing_pooled_is_no_evidence():
    assert pool([]) == pool([Evidence()]) == pool_folds([]) == Evidence()


def test_comparisons_are_judged_by_how_many_are_right_with_ties_as_half():
    evidence = ordered_right([2.0, -1.0, 0.5, 0.0], list("abcd"))
    assert evidence == (pytest.approx(2.5 / 4), pytest.approx(16))
    assert ordered_right([], []) == Evidence()
    assert ordered_right([1.0] * 2, list("ab")).lower_bound(0.95) < 0.5
    assert ordered_right([1.0] * 9, list("abcdefghi")).lower_bound(0.95) > 0.5


def test_comparisons_of_one_reply_prove_no_more_than_one():
    assert ordered_right([1.0] * 9, ["a"] * 9).precision == pytest.approx(4)
    assert ordered_right([1.0] * 4, list("aabc")).precision == pytest.approx(64 / 6)


def test_folds_of_one_fit_err_as_often_as_the_level_says():
    """Fits to thumbs that mean nothing, on replies that resemble each other: many runs, one level."""
    rng = np.random.default_rng(0)
    passes, naive, runs = 0, 0, 2000
    for _ in range(runs):
        replies, ups = rng.normal(size=(64, 12)), rng.random(64) < 0.5
        folds = np.arange(64) % 4
        parts = []
        for fold in range(4):
            rest, held_out = folds != fold, folds == fold
            taught = replies[rest].T @ (ups[rest] - ups[rest].mean())
            parts.append(held_out_auroc(list(replies[held_out] @ taught), list(ups[held_out])))
        passes += pool_folds(parts).lower_bound(0.95) > 0.5
        naive += pool(parts).lower_bound(0.95) > 0.5
    assert 0.03 < passes / runs < 0.065
    assert naive / runs > 0.09  # what taking the folds for independent would let through
