"""A sample of rows chosen by their content, so that it is the same in any order, chunking and number of threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._dtypes import Rows, own, storage

MAX_ROWS = 131_072
MAX_BYTES = 96 << 20
_ROWS_AT_ONCE = 4096  # compared with others: bounds the temporaries


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

    Attributes
    ----------
    num_seen : int
        How many have come.
    """

    def __init__(self, dim: int, dtype: str, num_rows: int | None) -> None:
        self.dim = dim
        self.dtype = dtype
        self._capacity = max(1, min(MAX_ROWS, MAX_BYTES // (dim * storage(dtype).itemsize)))
        self._halvings = 0
        self._expected = num_rows or 0
        self.num_seen = 0
        self._num_kept = 0
        # Memory is touched only as rows come, and once: fresh pages cost more than the copy.
        self._values = np.empty((0, dim), storage(dtype))
        self._keys = np.empty(0, np.uint64)

    def add(self, keys: NDArray[np.uint64], take: Callable[[NDArray[np.intp], NDArray[Any]], None]) -> None:
        """Look at rows by their keys; bad rows have key 0 and are left out.

        `take(numbers, out)` copies the rows of these numbers to `out`, in `storage(dtype)`.
        """
        self.num_seen += len(keys)
        self._lower_bound()
        chosen = self._below(keys)
        if self._num_kept + chosen.size > len(self._keys):
            self._refilter()  # what came under an earlier bound goes first
            self._reserve(self._num_kept + chosen.size)
        end = self._num_kept + chosen.size
        take(chosen, self._values[self._num_kept : end])
        self._keys[self._num_kept : end] = keys[chosen]
        self._num_kept = end
        # Rows of equal content have equal keys: a heap of them must not exhaust the memory.
        while self._num_kept > self._capacity + self._capacity // 4 and self._halvings < 63:
            kept = self._num_kept
            self._refilter()
            self._halvings += self._num_kept == kept

    def merge(self, other: Sample) -> None:
        """Look at what another sample has kept of other rows: then this is that of one that has seen them all."""
        self._halvings = max(self._halvings, other._halvings)
        total = self.num_seen + other.num_seen
        other.expect(max(total, self._expected))
        kept = slice(other._num_kept)
        self.add(other._keys[kept], partial(take_rows, other._values[kept]))
        self.num_seen = total
        self._lower_bound()

    def __getstate__(self) -> dict[str, Any]:
        self._refilter()
        kept = slice(self._num_kept)
        return self.__dict__ | {"_keys": self._keys[kept], "_values": self._values[kept]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keys, self._values = own(self._keys), own(self._values)

    def expect(self, num_rows: int) -> None:
        """Drop what does not stay where `num_rows` come in all, here and elsewhere."""
        self._expected = num_rows
        self._lower_bound()
        self._refilter()

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
        """Return the tensors `keys` `(n,)` and `rows` `(n, dim)`, and the counts, that `of_state` makes it from."""
        self._refilter()
        tensors = {"keys": self._keys[: self._num_kept], "rows": self._values[: self._num_kept]}
        return tensors, {"seen": self.num_seen, "halvings": self._halvings}

    @classmethod
    def of_state(
        cls, tensors: Mapping[str, NDArray[Any]], counts: Mapping[str, int], dim: int, dtype: str, num_rows: int | None
    ) -> Sample:
        """Return the sample that had this state, of which `num_rows` rows will have come in all.

        Raises
        ------
        ValueError
            If it is no state of such a sample.
        """
        keys, values = tensors["keys"], tensors["rows"]
        fit = keys.dtype == np.uint64 and keys.ndim == 1 and values.dtype == storage(dtype)
        counted = all(type(counts.get(name)) is int for name in ("seen", "halvings"))
        if not fit or values.shape != (len(keys), dim):
            raise ValueError(f"a sample has keys {keys.dtype} {keys.shape} and rows {values.dtype} {values.shape}")
        if not counted or not 0 <= counts["halvings"] < 64 or not len(keys) <= counts["seen"]:
            raise ValueError(f"a sample of {len(keys)} rows states {dict(counts)}")
        sample = cls(dim, dtype, num_rows)
        sample._halvings, sample.num_seen = counts["halvings"], counts["seen"]
        sample._reserve(len(keys))
        sample._keys[: len(keys)], sample._values[: len(keys)] = keys, values
        sample._num_kept = len(keys)
        return sample

    def _lower_bound(self) -> None:
        needed = max(self.num_seen, self._expected)
        while needed > self._capacity << self._halvings:
            self._halvings += 1

    def _below(self, keys: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Return which of the keys stay under the present bound, but for those of bad rows."""
        chosen = np.flatnonzero(keys <= np.uint64(min(1 << (64 - self._halvings), (1 << 64) - 1)))
        return chosen[keys[chosen] > 0]

    def _refilter(self) -> None:
        chosen = self._below(self._keys[: self._num_kept])
        if chosen.size < self._num_kept:
            self._values[: chosen.size] = self._values[chosen]
            self._keys[: chosen.size] = self._keys[chosen]
            self._num_kept = chosen.size

    def _reserve(self, num_rows: int) -> None:
        if num_rows <= len(self._keys):
            return
        room = max(num_rows, self._capacity + self._capacity // 2)
        values, keys = np.empty((room, self._values.shape[1]), self._values.dtype), np.empty(room, np.uint64)
        values[: self._num_kept] = self._values[: self._num_kept]
        keys[: self._num_kept] = self._keys[: self._num_kept]
        self._values, self._keys = values, keys

    def ranking(self) -> NDArray[np.intp]:
        """Return the numbers of the rows, for `take`, in order of their keys, equal keys in order of their bytes."""
        self._refilter()
        keys, values = self._keys[: self._num_kept], self._values[: self._num_kept]
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        as_bytes = values.view(np.uint8)
        # Rows that are equal altogether, as many captions are, may come in any order.
        parts = np.split(same, range(_ROWS_AT_ONCE, len(same), _ROWS_AT_ONCE))
        if any((as_bytes[order[part]] != as_bytes[order[part + 1]]).any() for part in parts):
            order = np.array(sorted(order.tolist(), key=lambda i: (int(keys[i]), as_bytes[i].tobytes())))
        return order

    def take(self, numbers: NDArray[np.intp]) -> Rows:
        """Return a copy of the rows that `ranking` calls so."""
        return Rows(self._values[numbers], self.dtype)


def take_rows(values: NDArray[Any], numbers: NDArray[np.intp], out: NDArray[Any]) -> None:
    """Copy rows of these numbers to `out`."""
    np.take(values, numbers, axis=0, out=out, mode="clip")
