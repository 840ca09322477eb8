"""Where rows fall among the centroids of the images, before a map and after it.

Source: AnisoAlign (arXiv 2605.07825) for the nearest centroid as a measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._extras import import_extra
from .._nearest import similarities
from .neighbors import Unit, faiss_threads, unit_rows
from .spectra import jensen_shannon

__all__ = ["Occupancy", "cluster", "occupancy"]

_TRAINING_ROWS = 256  # for each centroid


@dataclass(frozen=True, eq=False)
class Occupancy:
    """Shares of rows by nearest centroid.

    Attributes
    ----------
    image, before, after : ndarray
        `(num_centroids,)`: the shares of the image rows, and of the text rows before and after the map.
    js_before, js_after : float
        Jensen-Shannon divergence in bits of the text's shares and the images': 0 for the same, 1 for none in common.
    coverage_before, coverage_after : float
        The share of the centroids with image rows that have text rows too. It grows with the number of text rows:
        compare it only between sets of as many.
    agreement_before, agreement_after : float or None
        The share of text rows whose nearest centroid is that of their paired image; None for unpaired rows.
    num_centroids, seed : int
    """

    image: NDArray[np.float64]
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    js_before: float
    js_after: float
    coverage_before: float
    coverage_after: float
    agreement_before: float | None
    agreement_after: float | None
    num_centroids: int
    seed: int


def occupancy(
    image: Any,
    before: Any,
    after: Any,
    *,
    num_centroids: int = 64,
    seed: int = 0,
    paired: bool = False,
    num_threads: int | None = None,
) -> Occupancy:
    """Return how the text rows before and after a map share out over the centroids of spherical k-means on the images.

    Parameters
    ----------
    image
        `(n, dim)` array or tensor.
    before, after
        `(m, dim)`: the same text rows before and after the map.
    num_centroids
        At most `n`.
    seed
        Of the first centroids and of the rows that k-means looks at: at most 256 for each centroid.
    paired
        Whether row i of the text belongs to row i of the images.
    num_threads
        By default as many as FAISS takes.

    Raises
    ------
    ImportError
        If faiss is missing.
    ValueError
        If there are fewer image rows than centroids, shapes do not fit, or a row is zero or not finite.
    TypeError
        If rows are not float16, bfloat16, float32 or float64.
    """
    images = unit_rows(image, "image", num_threads)
    texts, mapped = (
        unit_rows(rows, name, num_threads, dim=images.shape[1]) for rows, name in ((before, "before"), (after, "after"))
    )
    if len(mapped) != len(texts):
        raise ValueError(f"after must have the {len(texts)} rows of before, got {len(mapped)}")
    if paired and len(texts) != len(images):
        raise ValueError(f"before must have the {len(images)} rows of image if paired, got {len(texts)}")
    if not 1 <= num_centroids <= len(images):
        raise ValueError(f"num_centroids must be between 1 and {len(images)}, the rows of image, got {num_centroids}")
    centroids = _centroids(images, num_centroids, seed, num_threads)
    of_images, of_texts, of_mapped = (_nearest_centroid(rows, centroids) for rows in (images, texts, mapped))
    held, texts_held, mapped_held = (
        np.bincount(nearest, minlength=num_centroids) / len(nearest) for nearest in (of_images, of_texts, of_mapped)
    )
    return Occupancy(
        held,
        texts_held,
        mapped_held,
        js_before=jensen_shannon(texts_held, held),
        js_after=jensen_shannon(mapped_held, held),
        coverage_before=float((texts_held[held > 0] > 0).mean()),
        coverage_after=float((mapped_held[held > 0] > 0).mean()),
        agreement_before=float((of_texts == of_images).mean()) if paired else None,
        agreement_after=float((of_mapped == of_images).mean()) if paired else None,
        num_centroids=num_centroids,
        seed=seed,
    )


def cluster(rows: Any, num_clusters: int, *, seed: int = 0, num_threads: int | None = None) -> NDArray[np.intp]:
    """Return the cluster `(n,)` of each row `(n, dim)` by spherical k-means; raises as `occupancy`."""
    unit = unit_rows(rows, "rows", num_threads)
    if not 1 <= num_clusters <= len(unit):
        raise ValueError(f"num_clusters must be between 1 and {len(unit)}, the number of rows, got {num_clusters}")
    return _nearest_centroid(unit, _centroids(unit, num_clusters, seed, num_threads))


def _centroids(unit: Unit, num_centroids: int, seed: int, num_threads: int | None) -> Unit:
    faiss = import_extra("faiss", "k-means")
    chosen = np.random.default_rng(seed).permutation(len(unit))[: _TRAINING_ROWS * num_centroids]
    with faiss_threads(faiss, num_threads):
        kmeans = faiss.Kmeans(unit.shape[1], num_centroids, spherical=True, min_points_per_centroid=1)
        kmeans.train(unit[chosen], init_centroids=unit[chosen[:num_centroids]])
    centroids: Unit = kmeans.centroids
    return centroids


def _nearest_centroid(unit: Unit, centroids: Unit) -> NDArray[np.intp]:
    return np.concatenate([products.argmax(axis=1) for _, products in similarities(unit, centroids)])
