"""How close two sets of embeddings lie, exactly and in float64; sets of some thousand rows.

Source: ReAlign (arXiv 2602.07026) for the centroid gap, the mixing and the overlap of neighbourhoods.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._nearest import neighbours, overlap
from .._nearest import similarities as in_parts


def _unit(rows: ArrayLike, name: str, like: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    values = np.asarray(rows, np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} must have shape (n, dim) and at least one row, got {values.shape}")
    if like is not None and values.shape != like.shape:
        raise ValueError(f"{name} must have shape {like.shape}, got {values.shape}")
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norms == 0, 1, norms)


def _check_k(k: int, num_candidates: int) -> None:
    if not 1 <= k <= num_candidates:
        raise ValueError(f"k must be between 1 and {num_candidates}, the number of candidates, got {k}")


def _neighbours(rows: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """Return `(n, k)` indices of the nearest other rows by cosine, in no order."""
    _check_k(k, len(rows) - 1)
    return neighbours(rows, k)


def centroid_gap(source: ArrayLike, target: ArrayLike) -> float:
    """Return the distance between the means of the unit rows of `source` `(n, dim)` and of `target` `(m, dim)`."""
    return float(np.linalg.norm(_unit(source, "source").mean(axis=0) - _unit(target, "target").mean(axis=0)))


def cosine_to_pair(source: ArrayLike, target: ArrayLike) -> float:
    """Return the mean cosine between row i of `source` and row i of `target`, both `(n, dim)`."""
    rows = _unit(source, "source")
    return float(np.einsum("ij,ij->i", rows, _unit(target, "target", rows)).mean())


def knn_mixing(source: ArrayLike, target: ArrayLike, k: int = 20) -> float:
    """Return the share of the `k` nearest neighbours (by cosine, self excluded) that come from the other set.

    Both sets `(n, dim)` count as many rows; two samples of one distribution give about one half.
    """
    rows = _unit(source, "source")
    both = np.concatenate([rows, _unit(target, "target", rows)])
    from_target = np.arange(len(both)) >= len(rows)
    return float((from_target[_neighbours(both, k)] != from_target[:, None]).mean())


def knn_overlap(before: ArrayLike, after: ArrayLike, k: int = 10) -> float:
    """Return the share of a row's `k` nearest neighbours in `before` that are still among them in `after`.

    Both are `(n, dim)`: the same rows before and after a map.
    """
    rows = _unit(before, "before")
    found = _neighbours(rows, k)
    mapped = np.asarray(after, np.float64)
    if len(mapped) != len(rows):
        raise ValueError(f"after must have the {len(rows)} rows of before, got {len(mapped)}")
    return overlap(found, _neighbours(_unit(mapped, "after"), k))


def recall_at(queries: ArrayLike, candidates: ArrayLike, k: int = 1) -> float:
    """Return the share of rows i of `queries` `(n, dim)` with row i of `candidates` among the `k` most similar.

    Candidates as similar as the right one count against it.
    """
    rows = _unit(queries, "queries")
    others = _unit(candidates, "candidates", rows)
    _check_k(k, len(others))
    hits = 0
    for part, similarities in in_parts(rows, others):
        right = similarities[np.arange(len(similarities)), np.arange(part.start, part.stop)]
        hits += int(((similarities >= right[:, None]).sum(axis=1) <= k).sum())
    return hits / len(rows)
