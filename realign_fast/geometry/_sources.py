"""Parts of a set, mapped sets, and samples of either: sources made of sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._dtypes import Rows
from .._errors import BadRowsError
from .._native import _C
from .._steps import Noise
from .._transform import Steps, transform_rows
from ..backends import count_threads
from ..io.sources import NOTHING, Batch, Done, Source
from ..methods import Parameters, unit_length

_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter the bits of counters (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Fold(Source):
    """One of `num_folds` disjoint parts of a source, of equal sizes but for a row.

    Of each `num_folds` rows in turn every fold gets one, which one is drawn for them. The same seed divides two sets
    of equal length alike, so that pairs stay together.

    Parameters
    ----------
    source
        Whose rows are divided; it must be reiterable and its number of rows known.
    num_folds, number
        Into how many, and which of them.
    seed
        Of the division.
    limit
        Divide the first so many rows only.
    refuse_bad_rows
        Raise BadRowsError, naming file and row, for any bad row met, of whatever fold; else they are in the folds.
    """

    def __init__(
        self, source: Source, num_folds: int, number: int, seed: int, limit: int | None, refuse_bad_rows: bool
    ) -> None:
        assert source.num_rows is not None
        self._source, self._num_folds, self._number, self._limit = source, num_folds, number, limit
        self._seed = np.uint64(seed * int(_STEP) % 2**64)
        self._refuses = refuse_bad_rows
        self.name, self.dim, self.dtype = source.name, source.dim, source.dtype
        total = source.num_rows if limit is None else min(source.num_rows, limit)
        rest = np.arange(total - total % num_folds, total)
        self.num_rows = total // num_folds + int(self._chosen(rest).sum())

    def _chosen(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        group, place = np.divmod(numbers.astype(np.uint64), np.uint64(self._num_folds))
        with np.errstate(over="ignore"):
            turn = _mixed(group * _STEP + self._seed) % np.uint64(self._num_folds)
        chosen: NDArray[np.bool_] = (place + turn) % np.uint64(self._num_folds) == self._number
        return chosen

    def batches(self, limit: int | None = None, done: Done = NOTHING) -> Iterator[Batch]:
        """Yield the rows of this fold in order, or the first `limit`."""
        start = given = 0
        for batch in self._source.batches(self._limit):
            rows = batch.rows
            if self._refuses:
                bad = _C.find_bad_rows(rows.values, rows.bfloat16, count_threads(None))
                if bad[2] >= 0:
                    batch.check()
                    raise BadRowsError(batch.origin, batch.start + bad[2], bad[0], bad[1])
            chosen = np.flatnonzero(self._chosen(np.arange(start, start + len(rows.values))))
            start += len(rows.values)
            chosen = chosen[: None if limit is None else limit - given]
            if chosen.size:
                yield Batch(Rows(rows.values[chosen], rows.dtype), self.name, given)
                given += chosen.size
            if limit is not None and given >= limit:
                return


class Mapped(Source):
    """What a map makes of the rows of a source, in float32; bad rows are zeros.

    Noise, where the map has any, is that of `seed` and the row's number in the source.
    """

    dtype = "float32"

    def __init__(self, source: Source, parameters: Parameters, seed: int = 0, num_threads: int | None = None) -> None:
        self._source, self._parameters, self._seed, self._num_threads = source, parameters, seed, num_threads
        self.name, self.dim, self.num_rows = source.name, source.dim, source.num_rows

    def batches(self, limit: int | None = None, done: Done = NOTHING) -> Iterator[Batch]:
        """Yield all mapped rows in order, or the first `limit`."""
        start = 0
        for batch in self._source.batches(limit):
            values = batch.rows.values
            noise = Noise.of(self._parameters.noise_std, self._seed, start, (len(values),))
            out = Rows(np.empty(values.shape, np.float32), "float32")
            transform_rows(Steps.of(self._parameters, noise), batch.rows, out, self._num_threads)
            yield Batch(out, batch.origin, batch.start, batch.number, batch.check)
            start += len(values)


class Drawn(NamedTuple):
    """Unit rows `(n, dim)` float32 drawn from a source, and the numbers `(n,)` they have in it; bad ones left out."""

    rows: NDArray[np.float32]
    numbers: NDArray[np.int64]


def numbers_of(num_rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return `min(count, num_rows)` distinct numbers below `num_rows`, ascending."""
    if count >= num_rows:
        return np.arange(num_rows)
    drawn: NDArray[np.int64] = np.sort(np.random.default_rng(seed).choice(num_rows, count, replace=False))
    return drawn


def draw(source: Source, numbers: NDArray[np.int64], num_threads: int | None = None) -> Drawn:
    """Return the rows of these ascending numbers, brought to unit length, in one read of the source."""
    rows = np.empty((len(numbers), source.dim), np.float32)
    project = Steps.of(unit_length(source.dim))
    start = 0
    for batch in source.batches(int(numbers[-1]) + 1 if len(numbers) else 0):
        begin, end = np.searchsorted(numbers, [start, start + len(batch.rows.values)])
        if end > begin:
            chosen = Rows(batch.rows.values[numbers[begin:end] - start], batch.rows.dtype)
            transform_rows(project, chosen, Rows(rows[begin:end], "float32"), num_threads)
        start += len(batch.rows.values)
    good = rows.any(axis=1)
    return Drawn(rows, numbers) if good.all() else Drawn(rows[good], numbers[good])


def few(rows: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Return at most so many of the rows, evenly spaced: what is drawn lies in the order of its source."""
    return rows[:: max(1, -(-len(rows) // count))]
