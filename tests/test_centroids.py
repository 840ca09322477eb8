"""The occupancy of centroids against plain loops, SciPy and scikit-learn."""

import sys

import faiss
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from realign_fast import reference
from realign_fast.geometry.centroids import occupancy
from realign_fast.geometry.spectra import jensen_shannon

CENTRES = reference.project(np.random.default_rng(0).normal(size=(8, 24)))


def blobs(counts, seed, spread=0.02):
    """Rows about the first centres, so many about each, in an order of their own."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return (CENTRES[which] + spread * rng.normal(size=(len(which), 24))).astype(np.float32), which


def test_shares_are_those_of_the_blobs():
    image, _ = blobs([40, 30, 20, 10], 1)  # the seeds below begin with a row of each
    text, _ = blobs([0, 25, 0, 75], 2)
    out, _ = blobs([50, 50, 0, 0], 3)
    found = occupancy(image, 1000 * text, out, num_centroids=4, seed=57)
    order = np.argsort(-found.image)
    np.testing.assert_allclose(found.image[order], [0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(found.before[order], [0, 0.25, 0, 0.75])
    np.testing.assert_allclose(found.after[order], [0.5, 0.5, 0, 0])
    assert found.js_before == pytest.approx(jensenshannon(found.before, found.image, base=2) ** 2)
    assert found.js_after == pytest.approx(jensenshannon(found.after, found.image, base=2) ** 2)
    assert (found.coverage_before, found.coverage_after) == (0.5, 0.5)
    assert (found.agreement_before, found.agreement_after) == (None, None)
    assert (found.num_centroids, found.seed) == (4, 57)


def test_agreement_of_pairs():
    image, which = blobs([30] * 4, 1)
    text = CENTRES[np.where(np.arange(120) < 60, which, (which + 1) % 4)]
    found = occupancy(image, text, image, num_centroids=4, seed=2, paired=True)
    assert (found.agreement_before, found.agreement_after) == (0.5, 1)
    assert (found.js_after, found.coverage_after) == (0, 1)


def test_centroids_serve_as_well_as_those_of_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    image = reference.project(np.random.default_rng(5).normal(size=(2000, 24)) * np.arange(1.0, 25) ** -0.5)
    text, _ = blobs([50] * 8, 6)
    found = occupancy(image, text, text, num_centroids=16)
    peer = cluster.KMeans(16, init="random", n_init=1, random_state=0).fit(image)
    shares = np.bincount(peer.labels_, minlength=16) / len(image)
    assert np.sort(found.image) == pytest.approx(np.sort(shares), abs=0.04)


def test_assignments_are_those_of_a_loop(monkeypatch):
    image, text, out = np.random.default_rng(7).normal(size=(3, 300, 10))
    kept = []
    kmeans = faiss.Kmeans

    def keep(*arguments, **options):
        kept.append(kmeans(*arguments, **options))
        return kept[0]

    monkeypatch.setattr(faiss, "Kmeans", keep)
    monkeypatch.setattr("realign_fast._nearest._CHUNK_BYTES", 1000)
    found = occupancy(image, text, out, num_centroids=20, paired=True)
    centroids = kept[0].centroids.astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    nearest = [
        [max(range(20), key=lambda c, row=row: row @ centroids[c]) for row in reference.project(rows)]
        for rows in (image, text, out)
    ]
    for shares, each in zip((found.image, found.before, found.after), nearest, strict=True):
        np.testing.assert_allclose(shares, [each.count(c) / 300 for c in range(20)])
    agreements = [np.mean([a == b for a, b in zip(each, nearest[0], strict=True)]) for each in nearest[1:]]
    assert [found.agreement_before, found.agreement_after] == pytest.approx(agreements)
    held = [c for c in range(20) if c in nearest[0]]
    assert found.coverage_before == pytest.approx(np.mean([c in nearest[1] for c in held]))


def test_the_same_seed_gives_the_same_result():
    image, text, out = np.random.default_rng(8).normal(size=(3, 1500, 12))
    first, again, other = (occupancy(image, text, out, num_centroids=5, seed=seed) for seed in (2, 2, 3))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.before, again.before)
    assert first.image.tolist() != other.image.tolist()


def test_constant_rows_and_a_centroid_a_row():
    rows = np.ones((30, 6))
    found = occupancy(rows, rows, rows, num_centroids=4, paired=True)
    assert (found.js_before, found.coverage_before, found.agreement_before) == (0, 1, 1)
    rows = np.random.default_rng(9).normal(size=(12, 6))
    found = occupancy(rows, rows, rows, num_centroids=12, num_threads=1)
    np.testing.assert_allclose(found.image, 1 / 12)


def test_divergence_of_extremes():
    same, apart = np.array([0.5, 0.5, 0]), np.array([0, 0, 1.0])
    assert (jensen_shannon(same, same), jensen_shannon(same, apart)) == (0, 1)


def test_captions_lie_by_the_centroids_of_their_images(shared_data):
    text, image = (np.load(shared_data / "mindgap_clip_coco500" / f"{side}.npy") for side in ("text", "image"))
    found = occupancy(image, text, image, num_centroids=16, paired=True)
    assert found.agreement_before > 5 * (found.before * found.image).sum()
    assert (found.js_after, found.coverage_after, found.agreement_after) == (0, 1, 1)


def test_faiss_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"k-means needs faiss: pip install 'realign-fast\[faiss\]'"):
        occupancy(CENTRES, CENTRES, CENTRES, num_centroids=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: occupancy(x, x, x), "num_centroids must be between 1 and 8, the rows of image, got 64"),
        (lambda x: occupancy(x, x, x, num_centroids=0), "num_centroids must be between 1 and 8"),
        (lambda x: occupancy(x[0], x, x), r"image must have shape \(n, dim\)"),
        (lambda x: occupancy(x, x[:, :4], x), "before must have rows of dimension 24"),
        (lambda x: occupancy(x, x, x[:4]), "after must have the 8 rows of before, got 4"),
        (lambda x: occupancy(x, x[:5], x[:5], paired=True), "before must have the 8 rows of image if paired, got 5"),
        (lambda x: occupancy(x, x, 0 * x), "after must have finite rows of non-zero norm, got row 0 and in all 8"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(CENTRES)
