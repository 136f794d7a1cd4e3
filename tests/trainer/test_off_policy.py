import numpy as np
import pytest

from trainer.off_policy import Clusters, doubly_robust, effective_share, ratios, snips

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


def logged(
    rng: np.random.Generator, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return replies of two kinds, whether each was rated up, propensities, and the target's weights.

    The logging policy says the good kind half of the time and guidance shows it with 0.8 where both are
    there; the target says it with 0.7, so its rate is 0.7 * 0.9 + 0.3 * 0.2 = 0.69.
    """
    pairs = rng.uniform(size=(n, 2)) < 0.5
    differ = pairs[:, 0] != pairs[:, 1]
    shows_good = rng.uniform(size=n) < 0.8
    shown = np.where(differ, shows_good, pairs[:, 0])
    propensity = np.where(differ, np.where(shown, 0.8, 0.2), 0.5)
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
