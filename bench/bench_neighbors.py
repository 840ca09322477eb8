"""The mixing of two sets against the search of FAISS alone on the same rows."""

from __future__ import annotations

import faiss
import numpy as np

from realign_fast.geometry.neighbors import mixing, unit_rows

CHECKED_BY = ("test_neighbors.py",)
DIM, K = 768, 20
PEER = "faiss.knn of unit rows alone"
WHY = "what the search finds is multiplied again in float64, so that every backend has the same neighbours"


def cloud(count: int, seed: int) -> np.ndarray:
    """Rows about a mean of their own, with a spectrum that falls as that of real embeddings."""
    rng = np.random.default_rng(seed)
    colours = np.arange(1, DIM + 1, dtype=np.float32) ** -0.65
    rows = rng.standard_normal((count, DIM), np.float32) * colours
    rows += rng.standard_normal(DIM, np.float32) * colours
    return rows


def test_mixing(measure, pick):
    count = pick(1_000, 3_000, 50_000)
    text, image = cloud(count, 0), cloud(count, 1)
    unit = unit_rows(np.concatenate([text, image]), "rows")
    measure(
        f"mixing, k {K}",
        lambda: mixing(text, image, K, backend="faiss"),
        {PEER: lambda: faiss.knn(unit, unit, K + 1, metric=faiss.METRIC_INNER_PRODUCT)},
        unit="s",
        work=2 * (2 * count) ** 2 * DIM,
        limit="sgemm",
        goals={PEER: 0.95},
        why={PEER: WHY},
        dtype="float32",
        shape=(2 * count, DIM),
        rounds=3,
    )
