"""A sample of rows chosen by their content, so that it is the same in any order, chunking and number of threads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ._dtypes import Rows

MAX_ROWS = 131_072
MAX_BYTES = 96 << 20


class Sample:
    """Keep the rows whose key lies below a bound that halves as rows arrive.

    After `n` rows the bound is `2**64 / 2**j` with the least `j` for which `n / 2**j` rows fit (at most 131,072 and
    at most 96 MiB), and smaller where many rows have the same content. Both depend on the set of rows alone.

    Parameters
    ----------
    dim, dtype
        Of the rows, which are kept in their own dtype.
    num_rows
        How many will come, where that is known: then no row is copied that would be dropped later.
    """

    def __init__(self, dim: int, dtype: str, num_rows: int | None) -> None:
        self._dim = dim
        self._dtype = dtype
        self._parts: list[NDArray[np.generic]] = []
        self._keys: list[NDArray[np.uint64]] = []
        self._capacity: int | None = None
        self._halvings = 0
        self._expected = num_rows or 0
        self._num_seen = 0
        self._num_kept = 0

    def add(self, rows: Rows, keys: NDArray[np.uint64]) -> None:
        """Look at rows and their keys; bad rows have key 0 and are left out."""
        if self._capacity is None:
            self._capacity = max(1, min(MAX_ROWS, MAX_BYTES // (self._dim * rows.values.itemsize)))
        self._num_seen += len(keys)
        needed = max(self._num_seen, self._expected)
        while needed > self._capacity << self._halvings:
            self._halvings += 1
        self._keep(rows.values, keys)
        # Rows of equal content have equal keys: a heap of them must not exhaust the memory.
        while self._num_kept > self._capacity + self._capacity // 4 and self._halvings < 63:
            kept = self._num_kept
            self._refilter()  # what came under an earlier bound goes first
            self._halvings += self._num_kept == kept

    def _keep(self, values: NDArray[np.generic], keys: NDArray[np.uint64]) -> None:
        chosen = np.flatnonzero(self._below(keys))
        if chosen.size:
            self._parts.append(values[chosen])
            self._keys.append(keys[chosen])
            self._num_kept += chosen.size

    def _below(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        # Keys are at least 1 for good rows; minus 1 maps them to [0, 2**64 - 1).
        bound = np.uint64((1 << (64 - self._halvings)) - 1)
        below: NDArray[np.bool_] = np.logical_and(keys != 0, keys - np.uint64(1) <= bound)
        return below

    def _refilter(self) -> None:
        parts, keys = self._parts, self._keys
        self._parts, self._keys, self._num_kept = [], [], 0
        for values, part_keys in zip(parts, keys, strict=True):
            self._keep(values, part_keys)

    def rows(self) -> Rows:
        """Return the rows in order of their keys, equal keys in order of their bytes."""
        if not self._parts:
            empty = np.empty((0, self._dim), np.uint16 if self._dtype == "bfloat16" else self._dtype)
            return Rows(empty, self._dtype)
        self._refilter()
        values = np.concatenate(self._parts)
        keys = np.concatenate(self._keys)
        self._parts, self._keys = [], []
        order = np.argsort(keys, kind="stable")
        ties = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        if ties.size:
            as_bytes = values.view(np.uint8)
            order = np.array(sorted(order.tolist(), key=lambda i: (int(keys[i]), as_bytes[i].tobytes())))
        return Rows(values[order], self._dtype)
