"""Nearest neighbours among some thousand rows, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK_BYTES = 64 << 20  # of similarities at a time


def similarities(queries: NDArray[Any], candidates: NDArray[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Yield the inner products of some of the queries with all candidates, and which queries they are."""
    step = max(1, _CHUNK_BYTES // (candidates.itemsize * len(candidates)))
    for start in range(0, len(queries), step):
        part = slice(start, min(start + step, len(queries)))
        yield part, queries[part] @ candidates.T


def neighbours(rows: NDArray[Any], k: int) -> NDArray[np.intp]:
    """Return `(n, k)` indices of the nearest other rows by inner product, in no order."""
    found = np.empty((len(rows), k), np.intp)
    for part, products in similarities(rows, rows):
        products[np.arange(len(products)), np.arange(part.start, part.stop)] = -np.inf
        found[part] = np.argpartition(-products, k - 1, axis=1)[:, :k]
    return found


def overlap(before: NDArray[np.intp], after: NDArray[np.intp]) -> float:
    """Return the share of the neighbours `before` `(n, k)` that are among those `after`."""
    return float((before[:, :, None] == after[:, None, :]).any(axis=2).mean())
