import numpy as np
import ot
import pytest
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel

import realign_fast as rf
from realign_fast.geometry import two_sample
from realign_fast.geometry.two_sample import (
    frechet,
    frechet_of_moments,
    linear_mmd,
    mmd,
    projections,
    sliced_wasserstein,
)
from realign_fast.reference import project

DIM = 12
TESTS = [mmd, linear_mmd, sliced_wasserstein, frechet]
SMALL = {mmd: {}, linear_mmd: {}, sliced_wasserstein: {"num_projections": 16}, frechet: {}}


def make(count, seed=0, shift=0.0, dim=DIM):
    return np.random.default_rng(seed).normal(0.3, 1, (count, dim)) + shift


def plain_mmd(x, y, gamma):
    of_x, of_y, across = rbf_kernel(x, gamma=gamma), rbf_kernel(y, gamma=gamma), rbf_kernel(x, y, gamma=gamma)
    within = [(each.sum() - np.trace(each)) / (len(each) * (len(each) - 1)) for each in (of_x, of_y)]
    return sum(within) - 2 * across.mean()


def median_gamma(rows):
    distances = euclidean_distances(rows)[np.triu_indices(len(rows), 1)]
    return 1 / (2 * np.median(distances) ** 2)


@pytest.mark.parametrize("sizes", [(50, 50), (40, 71), (4, 5)])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_mmd_is_that_of_the_definition(sizes, shift):
    x, y = project(make(sizes[0])), project(make(sizes[1], 1, shift))
    wanted = plain_mmd(x, y, median_gamma(np.concatenate([x, y])))
    found = mmd(x, y, num_resamples=20)
    assert found.value == pytest.approx(wanted, abs=1e-6)
    assert mmd(y, x, num_resamples=20).value == pytest.approx(found.value, abs=1e-6)
    assert found.num_rows == sizes


def test_mmd_deals_labels_as_if_the_kernel_were_computed_anew():
    x, y = project(make(9)), project(make(7, 1, 0.5))
    both, gamma = np.concatenate([x, y]), median_gamma(np.concatenate([x, y]))
    rng = np.random.default_rng(3)
    values = []
    for _ in range(40):
        first = rng.permutation(np.arange(16) < 9)
        values.append(plain_mmd(both[first], both[~first], gamma))
    found = mmd(x, y, num_resamples=40, seed=3)
    assert found.null == pytest.approx(np.quantile(values, 0.95), abs=1e-6)
    assert found.p_value == pytest.approx((1 + np.sum(np.array(values) >= found.value)) / 41)


@pytest.mark.parametrize("sizes", [(60, 60), (35, 50), (4, 9)])
def test_sliced_wasserstein_is_that_of_pot(sizes):
    x, y = project(make(sizes[0])), project(make(sizes[1], 1, 0.4))
    wanted = ot.sliced_wasserstein_distance(x, y, projections=projections(DIM, 32, 5))
    found = sliced_wasserstein(x, y, num_projections=32, num_resamples=5, seed=5)
    assert found.value == pytest.approx(wanted, rel=1e-5)


def test_frechet_is_that_of_the_definition():
    x, y = project(make(200)), project(make(150, 1, 0.5))
    (a, b), (s, t) = [rows.mean(axis=0) for rows in (x, y)], [np.cov(rows.T, ddof=0) for rows in (x, y)]
    wanted = np.square(a - b).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet(x, y, num_resamples=3).value == pytest.approx(wanted, rel=1e-4)
    moments = [rf.Moments(DIM, covariance=True).update(rows) for rows in (x, y)]
    assert frechet_of_moments(*moments) == pytest.approx(wanted, rel=1e-4)


def test_frechet_of_fewer_rows_than_dimensions():
    x, y = project(make(8, dim=20)), project(make(6, 1, dim=20))
    wanted = np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + sum(
        np.square(rows - rows.mean(axis=0)).sum(axis=1).mean() for rows in (x, y)
    )
    cross = [rows - rows.mean(axis=0) for rows in (x, y)]
    wanted -= 2 * np.linalg.svd(cross[0] @ cross[1].T, compute_uv=False).sum() / np.sqrt(8 * 6)
    assert frechet(x, y, num_resamples=2).value == pytest.approx(wanted, rel=1e-6)


def test_frechet_of_few_rows_is_that_of_their_moments():
    rows, (first, second) = project(make(30, dim=40)), np.random.default_rng(2).integers(0, 4, (2, 30)).astype(float)
    moments = [
        rf.Moments(40, covariance=True).update(np.repeat(rows, counts.astype(int), axis=0))
        for counts in (first, second)
    ]
    found = two_sample._frechet_of_few(rows.astype(np.float32), first, second)
    assert found == pytest.approx(frechet_of_moments(*moments), rel=1e-3)


def test_linear_mmd_estimates_the_same():
    x, y = make(40_000), make(40_000, 1, 0.5)
    found = linear_mmd(x, y)
    exact = mmd(x, y, num_rows=2000, num_resamples=10)
    assert found.interval[0] < exact.value < found.interval[1]
    assert found.p_value < 1e-6
    equal = linear_mmd(x, make(40_000, 2))
    assert equal.interval[0] < 0 < equal.interval[1]


def test_linear_mmd_is_without_bias():
    x, y = project(make(20)), project(make(20, 1, 0.6))
    wanted = plain_mmd(x, y, median_gamma(np.concatenate([x, y])))
    values = [linear_mmd(x, y, seed=seed).value for seed in range(800)]
    margin = 4 * np.std(values) / np.sqrt(800)
    assert np.mean(values) == pytest.approx(wanted, abs=margin)
    assert margin < 0.2 * wanted


@pytest.mark.parametrize("test", TESTS)
def test_equal_distributions_pass_and_others_do_not(test):
    options = SMALL[test] if test is linear_mmd else {"num_resamples": 19, **SMALL[test]}
    equal = [test(make(60, 2 * seed), make(60, 2 * seed + 1), seed=seed, **options).p_value for seed in range(40)]
    # Uniform p-values have mean 0.5; that of 40 has standard deviation 0.046.
    assert abs(np.mean(equal) - 0.5) < 0.16
    assert np.mean(np.array(equal) <= 0.05) < 0.2
    rows = 600 if test is linear_mmd else 60
    apart = [test(make(rows, 2 * seed), make(rows, 2 * seed + 1, 0.8), seed=seed, **options) for seed in range(5)]
    assert all(found.p_value <= 0.05 and found.value > found.null for found in apart)
    assert all(found.interval[0] < found.value < found.interval[1] for found in apart)


@pytest.mark.parametrize("test", TESTS)
def test_rows_count_by_direction_and_draws_by_seed(test):
    x, y = make(50), make(44, 1, 0.3)
    options = {} if test is linear_mmd else {"num_resamples": 10}
    found = test(x, y, seed=4, **options)
    assert found == test(1000 * x, 1e-3 * y, seed=4, **options)
    assert found != test(x, y, seed=5, **options)
    assert set(found.as_dict()) == {"value", "interval", "null", "p_value", "num_rows", "num_resamples", "seed"}
    if test is not linear_mmd:
        assert test(x, y, num_rows=20, **options).num_rows == (20, 20)


@pytest.mark.parametrize("test", TESTS)
def test_constant_sets(test):
    rows = np.tile(make(1), (10, 1))
    found = test(rows, rows)
    assert found.value == pytest.approx(0, abs=1e-6)
    assert found.p_value >= 0.5
    apart = test(rows, -rows)
    assert apart.value > 0.5
    assert apart.p_value < 0.05


def test_mostly_equal_rows_are_told_apart():
    row, other = make(1), make(1, 1)
    sets = np.repeat(row, 20, axis=0), np.concatenate([np.repeat(row, 16, axis=0), np.repeat(other, 4, axis=0)])
    assert mmd(*sets).value > 0.01
    # A cloud so narrow that float32 products of its rows are all the same.
    narrow = row + 1e-4 * make(30, 2), row + 1e-4 * make(30, 3, 1.5)
    assert mmd(*narrow, num_resamples=19).p_value == 0.05


@pytest.mark.parametrize("test", TESTS)
def test_bad_input_is_refused(test):
    rows = make(10)
    with pytest.raises(ValueError, match="source must have at least 4 rows, got 3"):
        test(rows[:3], rows)
    with pytest.raises(ValueError, match="target must have at least 4 rows, got 2"):
        test(rows, rows[:2])
    with pytest.raises(ValueError, match=r"dimension 12, got shape \(10, 5\)"):
        test(rows, rows[:, :5])
    rows[7] = np.nan
    with pytest.raises(ValueError, match="target must have finite rows of non-zero norm, got row 7"):
        test(make(10), rows)


def test_options_are_checked():
    rows = make(10)
    with pytest.raises(ValueError, match="num_rows must be a whole number of at least 4"):
        mmd(rows, rows, num_rows=3)
    with pytest.raises(ValueError, match="num_resamples must be a whole number of at least 2"):
        frechet(rows, rows, num_resamples=1)
    with pytest.raises(ValueError, match="num_projections must be a whole number of at least 1"):
        sliced_wasserstein(rows, rows, num_projections=0)
    plain = rf.Moments(DIM, covariance=True).update(rows)
    with pytest.raises(ValueError, match="source has dimension 12, target has dimension 3"):
        frechet_of_moments(plain, rf.Moments(3, covariance=True))
