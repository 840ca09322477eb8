import numpy as np
import pytest

import realign_fast as rf
from realign_fast.geometry.metrics import centroid_gap, cosine_to_pair, knn_mixing, knn_overlap, recall_at

# Measured in float64 with NumPy, independently of this package: gap, mixing, overlap, recall@1, cosine to the pair.
COCO = {
    None: (0.851, 0.000, 1.000, 0.506, 0.310),
    "anchor": (6.68e-3, 0.115, 0.907, 0.318, 0.677),
    "anchor_trace": (6.30e-3, 0.114, 0.909, 0.316, 0.680),
    "realign": (1.46e-3, 0.115, 0.907, 0.316, 0.679),
}


@pytest.mark.parametrize("method", COCO)
def test_what_real_embeddings_say(shared_data, method):
    text, image = (np.load(shared_data / "mindgap_clip_coco500" / f"{side}.npy") for side in ("text", "image"))
    out = text if method is None else rf.fit(text, image, method=method).transform(text.astype(np.float64))
    gap, mixing, overlap, recall, cosine = COCO[method]
    assert centroid_gap(out, image) == pytest.approx(gap, rel=5e-3)
    assert knn_mixing(out, image, k=20) == pytest.approx(mixing, abs=1e-3)
    assert knn_overlap(text, out, k=10) == pytest.approx(overlap, abs=1e-3)
    assert recall_at(out, image) == pytest.approx(recall, abs=3e-3)
    assert cosine_to_pair(out, image) == pytest.approx(cosine, abs=1e-3)


def test_two_samples_of_one_distribution_mix_by_half():
    rows = np.random.default_rng(0).normal(size=(2, 800, 16))
    assert knn_mixing(*rows) == pytest.approx(0.5, abs=0.02)


def test_chunks_change_nothing(monkeypatch):
    rows, others = np.random.default_rng(1).normal(size=(2, 50, 8))
    whole = knn_mixing(rows, others, k=5), knn_overlap(rows, others, k=5), recall_at(rows, others, k=5)
    monkeypatch.setattr("realign_fast._nearest._CHUNK_BYTES", 1)
    assert (knn_mixing(rows, others, k=5), knn_overlap(rows, others, k=5), recall_at(rows, others, k=5)) == whole


def test_a_constant_map_finds_nothing():
    images = np.random.default_rng(2).normal(size=(20, 4))
    assert recall_at(np.ones((20, 4)), np.ones((20, 4)), k=5) == 0
    assert recall_at(images, images) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: centroid_gap(x[0], x), "source must have shape"),
        (lambda x: centroid_gap(x, x[:0]), "at least one row"),
        (lambda x: cosine_to_pair(x, x[:3]), "target must have shape"),
        (lambda x: knn_mixing(x, x[:3]), "target must have shape"),
        (lambda x: knn_mixing(x, x, k=20), "k must be between 1 and 19"),
        (lambda x: knn_overlap(x, x, k=10), "k must be between 1 and 9"),
        (lambda x: knn_overlap(x, x[:4], k=3), "must have the 10 rows"),
        (lambda x: recall_at(x, x, k=0), "k must be between"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((10, 4)))
