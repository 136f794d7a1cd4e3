import numpy as np
import pytest

from trainer.off_policy import (
    Clusters,
    Estimate,
    by_design,
    doubly_robust,
    effective_share,
    moves_of_rate,
    ratios,
    snips,
    spread,
)

NAMES = ["ann", "bob", "eve", "dan"]


def test_the_rate_is_the_weighted_mean():
    estimate = snips(np.array([1.0, 3.0]), np.array([1.0, 0.0]), NAMES[:2], Clusters(NAMES[:2]))
    assert estimate.value == pytest.approx(0.25)


def test_the_standard_error_of_equal_weights_is_that_of_a_mean():
    outcomes = np.array([1.0, 0.0, 1.0, 1.0])
    estimate = snips(np.ones(4), outcomes, NAMES, Clusters(NAMES))
    assert estimate.standard_error == pytest.approx(outcomes.std(ddof=1) / 2)


def test_thumbs_of_one_user_count_as_one():
    outcomes = np.array([1.0, 0.0])
    single = snips(np.ones(2), outcomes, NAMES[:2], Clusters(NAMES))
    names = [name for name in NAMES[:2] for _ in range(50)]
    repeated = snips(np.ones(100), outcomes.repeat(50), names, Clusters(NAMES))
    assert repeated.value == single.value
    assert repeated.standard_error == pytest.approx(single.standard_error)


def test_what_two_estimates_share_cancels_in_their_difference():
    outcomes, weights = np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 2.0, 1.0, 1.0])
    clusters = Clusters(NAMES)
    same = snips(weights, outcomes, NAMES, clusters).minus(
        snips(weights, outcomes, NAMES, clusters)
    )
    assert (same.value, same.standard_error) == (0, 0)


def test_one_cluster_bounds_nothing():
    estimate = snips(np.ones(3), np.ones(3), ["ann"] * 3, Clusters(["ann"]))
    assert estimate.bounds(0.95) == (-np.inf, np.inf)


def test_users_who_rated_nothing_lend_no_certainty():
    outcomes, names = np.array([1.0, 0.0, 1.0]), NAMES[:3]
    few = snips(np.ones(3), outcomes, names, Clusters(names))
    many = snips(np.ones(3), outcomes, names, Clusters([*names, *range(500)]))
    assert many.bounds(0.95) == pytest.approx(few.bounds(0.95))


def test_ratios_are_truncated():
    found = ratios(np.array([-1.0, 0.0]), np.array([-2.0, -50.0]), most=10.0)
    assert found.tolist() == pytest.approx([np.e, 10.0])


def test_the_effective_share_is_kishs():
    assert effective_share(np.ones(7)) == pytest.approx(1)
    assert effective_share(np.array([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)


def test_the_design_knows_what_candidates_that_are_hardly_shown_would_do():
    """Two requests, each thumb of theirs given twice: 1/2 * sqrt(2 / (4 * 0.9)), and the same with 0.1."""
    found = by_design(np.array([3.0, 3.0]), np.array([0.9, 0.1]), requests=2, rated=4)
    assert found.tolist() == pytest.approx([0.372678, 1.118034], abs=1e-6)


def test_what_moves_a_rate_by_hand():
    """A thumb up with 0.8 varies by 0.4, and is expected 0.3 above a rate of 0.5."""
    found = moves_of_rate(np.array([2.0]), np.array([0.8]), 0.5)
    assert found.tolist() == pytest.approx([0.8, 0.6])
    assert spread(np.array([0.8, 0.5, 1.0])).tolist() == pytest.approx([0.4, 0.5, 0.0])


def test_an_error_is_the_larger_of_what_ratings_and_design_say():
    seen, design = np.array([0.3, -0.3]), np.array([0.3, 0.4])
    assert Estimate(0.5, seen, 2).standard_error == pytest.approx(0.6)
    assert Estimate(0.5, seen / 2, 2, design).standard_error == pytest.approx(0.5)
    other = Estimate(0.4, seen, 2, np.array([0.3, -0.4]))
    assert Estimate(0.5, seen, 2, design).minus(other).standard_error == pytest.approx(0.8)


SHARP = 0.98
ALL_LIKED, HALF_LIKED = 0.69, 0.55  # 0.7 or 0.5 of the good kind: 0.9 up of it, 0.2 of the other


def design_of(
    rng: np.random.Generator, share_good: float, rated: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what 4000 candidates of `logged` move an estimate by, and the probabilities of their thumbs."""
    pairs = rng.uniform(size=(2000, 2)) < 0.5
    differ = (pairs[:, 0] != pairs[:, 1]).repeat(2)
    kinds = pairs.ravel()
    propensities = np.where(differ, np.where(kinds, SHARP, 1 - SHARP), 0.5)
    ratio = np.where(kinds, share_good, 1 - share_good) / 0.5
    moves = by_design(ratio, propensities, requests=2000, rated=rated)
    return moves, np.where(kinds, 0.9, 0.2)


@pytest.mark.parametrize("has_design", [True, False])
def test_intervals_hold_where_few_thumbs_miss_what_is_hardly_shown(has_design):
    """Without the design they do not: seldom shown, and then counting fifty-fold, is the kind that displeases."""
    moves, predicted = design_of(np.random.default_rng(0), 0.7, rated=40)
    inside, names = 0, list(range(40))
    for seed in range(300):
        _, ups, propensity, weights = logged(np.random.default_rng(seed), 40, shows_good=SHARP)
        estimate = snips(weights / propensity, ups, names, Clusters(names))
        if has_design:
            expected = moves_of_rate(moves, predicted, estimate.value)
            estimate = estimate._replace(expected=expected)
        low, high = estimate.bounds(0.95)
        inside += low <= ALL_LIKED <= high
    assert (inside / 300 > 0.93) is has_design


def test_errors_of_rates_and_of_their_difference_are_those_that_estimates_have():
    """With many thumbs, so that what is expected is what happens: over draws, of a policy and of a worse one."""
    rated = 4000
    names = list(range(rated))
    clusters = Clusters(names)
    better, worse = [], []
    for seed in range(200):
        _, ups, propensity, weights = logged(np.random.default_rng(seed), rated, shows_good=SHARP)
        better.append(snips(weights / propensity, ups, names, clusters).value)
        worse.append(snips(1.0 / propensity, ups, names, clusters).value)
    found = []
    for share, value in ((0.7, ALL_LIKED), (0.5, HALF_LIKED)):
        moves, predicted = design_of(np.random.default_rng(1), share, rated)
        found.append(Estimate(value, np.zeros(2), 2, moves_of_rate(moves, predicted, value)))
    assert found[0].standard_error == pytest.approx(np.std(better), rel=0.15)
    assert found[1].standard_error == pytest.approx(np.std(worse), rel=0.15)
    gain = found[1].minus(found[0]).standard_error
    assert gain == pytest.approx(np.std(np.subtract(worse, better)), rel=0.15)


def logged(
    rng: np.random.Generator, n: int, *, shows_good: float = 0.8
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return replies of two kinds, whether each was rated up, propensities, and the target's weights.

    The logging policy says the good kind half of the time and guidance shows it with 0.8 where both are
    there; the target says it with 0.7, so its rate is 0.7 * 0.9 + 0.3 * 0.2 = 0.69.
    """
    pairs = rng.uniform(size=(n, 2)) < 0.5
    differ = pairs[:, 0] != pairs[:, 1]
    shown = np.where(differ, rng.uniform(size=n) < shows_good, pairs[:, 0])
    propensity = np.where(differ, np.where(shown, shows_good, 1 - shows_good), 0.5)
    ups = rng.uniform(size=n) < np.where(shown, 0.9, 0.2)
    return shown, ups.astype(float), propensity, np.where(shown, 0.7, 0.3) / 0.5


def test_the_estimate_is_right_where_the_plain_mean_is_not_and_its_interval_holds():
    inside, errors, naive = 0, [], []
    for seed in range(300):
        _, ups, propensity, weights = logged(np.random.default_rng(seed), 150)
        names = list(range(150))
        estimate = snips(weights / propensity, ups, names, Clusters(names))
        low, high = estimate.bounds(0.95)
        inside += low <= 0.69 <= high
        errors.append(estimate.value - 0.69)
        naive.append(np.average(ups, weights=weights) - 0.69)
    assert abs(np.mean(errors)) < 0.01
    assert abs(np.mean(naive)) > 0.05
    assert 0.92 < inside / 300 < 0.98


@pytest.mark.parametrize("predicted", [(0.9, 0.2), (0.1, 0.6)])
def test_doubly_robust_is_right_with_a_good_model_and_with_a_bad_one(predicted):
    good, bad = predicted
    errors, widths, plain_widths = [], [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        shown, ups, propensity, weights = logged(rng, 150)
        names = list(range(150))
        clusters = Clusters(names)
        # Candidates: all that was sampled, of which guidance shows one.
        kinds = rng.uniform(size=600) < 0.5
        of_candidates = np.where(kinds, 0.7, 0.3) / 0.5
        direct = snips(
            of_candidates, np.where(kinds, good, bad), [i // 4 for i in range(600)], clusters
        )
        residuals = ups - np.where(shown, good, bad)
        robust = doubly_robust(direct, weights / propensity, residuals, names, clusters)
        errors.append(robust.value - 0.69)
        widths.append(robust.standard_error)
        plain_widths.append(snips(weights / propensity, ups, names, clusters).standard_error)
    assert abs(np.mean(errors)) < 0.01
    if predicted == (0.9, 0.2):
        assert np.mean(widths) < np.mean(plain_widths)
