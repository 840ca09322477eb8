"""How close two sets of embeddings lie.

Source: ReAlign (arXiv 2602.07026) for the centroid gap.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .neighbors import knn_mixing, knn_overlap, recall_at

__all__ = ["centroid_gap", "cosine_to_pair", "knn_mixing", "knn_overlap", "recall_at"]


def _unit(rows: ArrayLike, name: str, like: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    values = np.asarray(rows, np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} must have shape (n, dim) and at least one row, got {values.shape}")
    if like is not None and values.shape != like.shape:
        raise ValueError(f"{name} must have shape {like.shape}, got {values.shape}")
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norms == 0, 1, norms)


def centroid_gap(source: ArrayLike, target: ArrayLike) -> float:
    """Return the distance between the means of the unit rows of `source` `(n, dim)` and of `target` `(m, dim)`."""
    return float(np.linalg.norm(_unit(source, "source").mean(axis=0) - _unit(target, "target").mean(axis=0)))


def cosine_to_pair(source: ArrayLike, target: ArrayLike) -> float:
    """Return the mean cosine between row i of `source` and row i of `target`, both `(n, dim)`."""
    rows = _unit(source, "source")
    return float(np.einsum("ij,ij->i", rows, _unit(target, "target", rows)).mean())
