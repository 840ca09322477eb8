"""Spectra and angles, against SciPy and plain loops."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon, pdist
from scipy.stats import entropy, linregress, pearsonr

import realign_fast as rf
from realign_fast.geometry import spectra
from realign_fast.geometry.spectra import (
    angular_js,
    anisotropy,
    cosine_density,
    covariance_gap,
    effective_dimension,
    effective_rank,
    eigenvalues,
    pairwise_correlation,
    spectrum_correlation,
    spectrum_exponent,
    subspace_overlap,
)


def unit_cloud(count, dim, seed=0, decay=0.6, centre=0.5):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, dim)) / np.arange(1, dim + 1) ** decay + centre * np.eye(dim)[-1]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def covariance(rows):
    return np.cov(rows.T, ddof=0)


def test_eigenvalues_of_a_covariance_and_of_moments():
    rows = unit_cloud(40, 64)
    wanted = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2 / 40
    found = eigenvalues(covariance(rows))
    np.testing.assert_allclose(found[:40], wanted, atol=1e-16)
    assert (found >= 0).all()
    assert found.shape == (64,)
    streamed = eigenvalues(rf.Moments(64, covariance=True).update(rows))
    np.testing.assert_allclose(streamed, found, atol=2e-7 * found[0])


@pytest.mark.parametrize("exponent", [0, 0.5, 1.33, 1.83])
@pytest.mark.parametrize("ranks", [None, (1, 500), (3, 4), (10, 99)])
def test_a_power_law_gives_its_exponent(exponent, ranks):
    values = 0.3 * np.arange(1, 501.0) ** -exponent
    found = spectrum_exponent(np.random.default_rng(0).permutation(values), ranks)
    assert found.exponent == pytest.approx(exponent, abs=1e-10)
    assert found.ranks == (ranks or (10, 250))


def test_an_exponent_is_a_regression():
    values = eigenvalues(covariance(unit_cloud(100, 300)))
    found = spectrum_exponent(values)
    assert found.ranks == (10, 49)  # of 99 positive ones
    wanted = linregress(np.log(np.arange(10, 50)), np.log(values[9:49])).slope
    assert found.exponent == pytest.approx(-wanted, rel=1e-12)


@pytest.mark.parametrize("ranks", [(0, 5), (5, 5), (7, 3), (2, 31)])
def test_ranks_without_positive_eigenvalues_are_refused(ranks):
    values = np.r_[np.ones(30), np.full(30, 1e-9), np.zeros(4)]
    with pytest.raises(ValueError, match=r"between 1 and 30, .* 1e-06 of the largest, got \(\d, \d+\)$"):
        spectrum_exponent(values, ranks)
    with pytest.raises(ValueError, match=r"got \(10, 9\) by default"):
        spectrum_exponent(np.ones(18))


@pytest.mark.parametrize("count", [1, 2, 50])
def test_dimensions_of_flat_and_of_falling_spectra(count):
    flat = np.r_[np.full(count, 0.2), np.zeros(10)]
    assert effective_rank(flat) == pytest.approx(count)
    assert effective_dimension(flat) == pytest.approx(count)
    assert anisotropy(flat) == pytest.approx((count + 10) / count)
    falling = np.random.default_rng(count).exponential(size=count)
    assert effective_rank(falling) == pytest.approx(np.exp(entropy(falling)))
    assert effective_dimension(falling) == pytest.approx(sum(falling) ** 2 / sum(falling**2))
    assert anisotropy(falling) == pytest.approx(max(falling) / np.mean(falling))


def test_rounding_below_zero_counts_as_zero():
    assert effective_rank([0.5, 0.5, -1e-18]) == pytest.approx(2)


def test_covariances_are_compared_entry_by_entry():
    text, image = covariance(unit_cloud(500, 12)), covariance(unit_cloud(500, 12, seed=1, decay=0.3))
    wanted = np.sqrt(((image - text) ** 2).sum() / (image**2).sum())
    assert covariance_gap(text, image) == pytest.approx(wanted)
    assert covariance_gap(image, image) == 0
    moments = [rf.Moments(12, covariance=True).update(unit_cloud(500, 12, *args)) for args in ((0,), (1, 0.3))]
    assert covariance_gap(*moments) == pytest.approx(wanted, rel=1e-6)


def test_the_correlation_of_spectra_is_pearsons():
    text, image = (
        eigenvalues(covariance(unit_cloud(count, 60, count, decay))) for count, decay in ((40, 1), (90, 0.4))
    )
    wanted = pearsonr(np.log(text[:39]), np.log(image[:39])).statistic
    assert spectrum_correlation(text, image) == pytest.approx(wanted, rel=1e-12)
    assert spectrum_correlation(image, 7 * image) == pytest.approx(1)


@pytest.mark.parametrize("q", [1, 4, 20])
def test_the_overlap_of_subspaces(q):
    text, image = unit_cloud(300, 20), unit_cloud(300, 20, seed=1)
    bases = [np.linalg.svd(rows - rows.mean(axis=0))[2][:q].T for rows in (text, image)]
    projections = [basis @ basis.T for basis in bases]
    found = subspace_overlap(covariance(text), covariance(image), q)
    assert found == pytest.approx(np.trace(projections[0] @ projections[1]) / q)
    assert subspace_overlap(covariance(text), covariance(text), q) == pytest.approx(1)


def test_orthogonal_subspaces_do_not_overlap():
    assert subspace_overlap(np.diag([2.0, 1, 1e-4, 1e-5]), np.diag([1e-5, 1e-4, 1, 2.0]), 2) == pytest.approx(0)


@pytest.mark.parametrize("count", [3, 511, 512, 513, 1030])
def test_the_correlation_of_all_cosines(count):
    before = unit_cloud(count, 10)
    after = before @ np.random.default_rng(1).normal(size=(10, 7))
    wanted = pearsonr(pdist(before, "cosine"), pdist(after, "cosine")).statistic
    assert pairwise_correlation(before * 9, after.astype(np.float32)) == pytest.approx(wanted, abs=1e-6)
    assert pairwise_correlation(before, 1000 * before) == pytest.approx(1)


@pytest.mark.parametrize("bins", [1, 7, 200])
@pytest.mark.parametrize("count", [2, 40, 700])
def test_a_density_is_that_of_all_pairs(bins, count):
    rows = unit_cloud(count, 6)
    edges, density = cosine_density(rows, bins=bins)
    cosines = [rows[i] @ rows[j] for i in range(count) for j in range(i + 1, count)]
    wanted, wanted_edges = np.histogram(cosines, bins, (-1, 1), density=True)
    np.testing.assert_allclose(edges, wanted_edges, atol=1e-15)
    np.testing.assert_allclose(density, wanted, rtol=1e-12)
    assert (density * np.diff(edges)).sum() == pytest.approx(1)


def test_duplicates_and_opposites_lie_at_the_ends():
    row = unit_cloud(1, 50)
    edges, density = cosine_density(np.concatenate([row, 3 * row, -row]), bins=4)
    np.testing.assert_allclose(density * np.diff(edges), [2 / 3, 0, 0, 1 / 3])


@pytest.mark.parametrize("bins", [10, 200])
def test_the_divergence_is_scipys_squared(bins):
    text, image = unit_cloud(300, 8), unit_cloud(200, 8, seed=1, centre=2)
    shares = [np.histogram(1 - pdist(rows, "cosine"), bins, (-1, 1))[0] for rows in (text, image)]
    assert angular_js(text, image, bins=bins) == pytest.approx(jensenshannon(*shares, base=2) ** 2, rel=1e-9)
    assert angular_js(text, text, bins=bins) == 0


def test_sets_without_a_cosine_in_common_are_one_bit_apart():
    assert angular_js(np.eye(5), np.ones((5, 5))) == pytest.approx(1)


def test_samples_depend_on_the_seed_alone(monkeypatch):
    text, image = unit_cloud(600, 8), unit_cloud(500, 8, seed=1, decay=0)

    def measure(**options):
        return angular_js(text, image, num_rows=300, **options), pairwise_correlation(
            text, text[:, ::-1] + 0.1, num_rows=300, **options
        )

    assert measure() == measure(seed=0)
    assert measure() != measure(seed=1)
    whole = angular_js(text, image)
    assert measure()[0] == pytest.approx(whole, rel=0.2)
    before = measure()
    monkeypatch.setattr(spectra, "_ROWS_AT_A_TIME", 7)
    assert measure() == pytest.approx(before, rel=1e-10)


@pytest.mark.parametrize("name", ["mindgap_clip_coco500", "mindgap_videoclip"])
def test_a_fit_brings_angles_nearer_and_keeps_their_order(shared_data, name):
    text, image = (np.load(shared_data / name / f"{side}.npy") for side in ("text", "image"))
    out = rf.fit(text, image).transform(text.astype(np.float64))
    assert angular_js(out, image) < 0.6 * angular_js(text, image)
    assert pairwise_correlation(text, out) > 0.95


SQUARE = np.diag([3.0, 2, 1, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: eigenvalues(np.ones((3, 4))),
            r"covariance must be Moments or .* shape \(dim, dim\), got shape \(3, 4\)",
        ),
        (lambda: eigenvalues(np.diag([1, np.nan])), "covariance must be finite"),
        (lambda: eigenvalues(np.array([[1.0, 2], [3, 4]])), "covariance must be symmetric"),
        (lambda: eigenvalues(rf.Moments(3).update(np.eye(3))), "hold no covariance"),
        (lambda: effective_rank(SQUARE), "values must be finite eigenvalues"),
        (lambda: effective_rank(np.zeros(3)), "some of them positive"),
        (lambda: anisotropy([1, np.inf]), "values must be finite"),
        (lambda: covariance_gap(SQUARE, np.eye(3)), "source has dimension 4, target has dimension 3"),
        (lambda: covariance_gap(SQUARE, 0 * SQUARE), "target has no variance"),
        (lambda: spectrum_correlation([3, 2, 1], [2, 1]), "source has 3 eigenvalues, target has 2"),
        (lambda: spectrum_correlation([3, 2, 1], [2, 1, 1e-8]), "needs 3 eigenvalues .* got 2"),
        (lambda: spectrum_correlation([3, 2, 1], [2, 2, 2]), "all eigenvalues of target are equal"),
        (lambda: subspace_overlap(SQUARE, np.eye(4), 4), "q must be at most 3, .* of source, got 4"),
        (lambda: subspace_overlap(SQUARE, SQUARE, 0), "q must be a whole number of at least 1"),
        (lambda: pairwise_correlation(np.eye(2), np.eye(2)), "before must have at least 3 rows, got 2"),
        (lambda: pairwise_correlation(np.eye(4), np.eye(4)[:3]), "after must have the 4 rows of before, got 3"),
        (lambda: pairwise_correlation(unit_cloud(9, 3), np.ones((9, 3))), "all pairs of rows of after have the same"),
        (
            lambda: pairwise_correlation(unit_cloud(9, 3), unit_cloud(9, 3), num_rows=1),
            "num_rows must be .* at least 2",
        ),
        (lambda: cosine_density(np.eye(3), bins=0), "bins must be a whole number of at least 1"),
        (lambda: cosine_density(np.eye(3)[:1]), "rows must have at least 2 rows, got 1"),
        (lambda: angular_js(np.eye(3), np.diag([1, 0, np.nan])), "target: row 1 .* 2 of 3 rows"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
