"""Reads of a whole set: its moments, a sample of it, the moments of what a map makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from ._errors import BadRowsError
from ._progress import progress as show_progress
from ._ranks import ALONE, Ranks
from ._sample import Sample, take_rows
from .backends import check_has_kernels, choose, find_device
from .io.sources import Batch, Source
from .methods import Parameters
from .moments import Moments, OnBadRows, Precision, check_on_bad_rows


class Reader:
    """Reads through the C++ kernels.

    Parameters
    ----------
    on_bad_rows
        "raise", "skip" or "zero".
    num_threads
        By default the cores this process may use.
    limit
        Read at most so many rows of each set.
    progress
        Show progress on stderr.
    """

    def __init__(
        self,
        on_bad_rows: OnBadRows,
        num_threads: int | None = None,
        *,
        limit: int | None = None,
        progress: bool = False,
    ) -> None:
        check_on_bad_rows(on_bad_rows)
        self._on_bad_rows: OnBadRows = on_bad_rows
        self._num_threads = num_threads
        self._limit = limit
        self._progress = progress

    def moments(self, source: Source, covariance: bool = False, precision: Precision = "high") -> Moments:
        """Return the moments of all rows, with their covariance where asked for.

        Raises
        ------
        BadRowsError
            A ValueError naming file and row, under "raise".
        """
        moments = Moments(source.dim, covariance, precision)
        for batch in self._batches(source):
            with _located(batch):
                moments.update_rows(batch.rows, self._on_bad_rows, self._num_threads)
        return moments

    def moments_and_sample(self, source: Source, covariance: bool = False) -> tuple[Moments, Sample]:
        """Return the moments of all rows, and some of them, chosen by their content; raises as `moments`."""
        moments, sample = Moments(source.dim, covariance), self._new_sample(source)
        for batch in self._batches(source):
            values = batch.rows.values
            keys = np.empty(len(values), np.uint64)
            with _located(batch):
                moments.update_rows(batch.rows, self._on_bad_rows, self._num_threads, keys)
            sample.add(keys, partial(take_rows, values))
        return moments, sample

    def transformed_moments(self, source: Source, parameters: Parameters) -> Moments:
        """Return the moments of what the map makes of all rows; raises as `moments`."""
        moments = Moments(source.dim)
        affine = None if parameters.affine is None else parameters.affine.for_kernels
        for batch in self._batches(source):
            with _located(batch):
                moments.update_transformed(batch.rows, affine, parameters.row_map, self._on_bad_rows, self._num_threads)
        return moments

    def _num_rows(self, source: Source) -> int | None:
        known = source.num_rows
        return known if known is None or self._limit is None else min(known, self._limit)

    def _new_sample(self, source: Source) -> Sample:
        return Sample(source.dim, source.dtype, self._num_rows(source))

    def _batches(self, source: Source) -> Iterator[Batch]:
        total = self._num_rows(source)
        with show_progress(f"read {source.name}", total, enabled=self._progress) as advance:
            for batch in source.batches(self._limit):
                yield batch
                advance(len(batch.rows.values))


class RanksReader(Reader):
    """Reads, in each of several processes, the share it is given, and adds up."""

    def __init__(self, reader: Reader, ranks: Ranks) -> None:
        self._reader, self._ranks = reader, ranks

    def moments(self, source: Source, covariance: bool = False, precision: Precision = "high") -> Moments:
        """Return, in every process, the moments of all rows."""
        return self._ranks.total(self._reader.moments(source, covariance, precision))

    def moments_and_sample(self, source: Source, covariance: bool = False) -> tuple[Moments, Sample]:
        """Return, in every process, the moments of all rows, and in the first the sample of one that reads them all."""
        moments, part = self._reader.moments_and_sample(source, covariance)
        moments = self._ranks.total(moments)
        num_rows = sum(self._ranks.gather(part.num_seen))
        sample = Sample(source.dim, source.dtype, num_rows)
        part.expect(num_rows)
        for each in self._ranks.collect(part):
            sample.merge(each)
        return moments, sample

    def transformed_moments(self, source: Source, parameters: Parameters) -> Moments:
        """Return, in the first process, the moments of what its map makes of all rows; the others `follow`."""
        return self._ranks.total(self._reader.transformed_moments(source, self._ranks.broadcast(parameters)))

    def follow(self, source: Source) -> Any:
        """Read `source` whenever the first process maps it; return what it broadcasts that is no map."""
        while isinstance(found := self._ranks.broadcast(None), Parameters):
            self._ranks.total(self._reader.transformed_moments(source, found))
        return found


@contextmanager
def _located(batch: Batch) -> Iterator[None]:
    """Give a bad row the place of its batch."""
    try:
        yield
    except BadRowsError as error:
        raise error.moved(batch.origin, batch.start) from None


def reader_for(
    backend: str, sources: tuple[Source, ...], *arguments: Any, ranks: Ranks = ALONE, **options: Any
) -> Reader:
    """Return what reads these sources: where they lie on one GPU, or where "triton" is asked for, there.

    Of several processes each reads its share of them (see `Source.share`).

    Raises
    ------
    ValueError
        If a backend asked for by name cannot run, or several processes are to stop at a limit.
    """
    if ranks.size > 1:
        if options.get("limit") is not None:
            raise ValueError("a limit needs the rows in order: read them in one process, without torchrun")
        return RanksReader(reader_for(backend, sources, *arguments, **options), ranks)
    check_has_kernels(backend, "a fit")
    devices = {source.device for source in sources if source.device is not None}
    if len(devices) > 1:
        raise ValueError(f"text and image must be on one device, got {' and '.join(sorted(map(str, devices)))}")
    if backend == "triton" and not devices:
        devices = {find_device()}
    device = next(iter(devices), "cpu")
    if choose(backend, str(device), {source.dtype for source in sources}) == "triton":
        from ._gpu import DeviceReader

        return DeviceReader(device, *arguments, **options)
    return Reader(*arguments, **options)
