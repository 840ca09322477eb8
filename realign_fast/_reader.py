"""Reads of a whole set: its moments, a sample of it, the moments of what a map makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

from ._checkpoint import Checkpoint, Read, hash_of, nothing_done
from ._errors import BadRowsError
from ._progress import progress as show_progress
from ._ranks import ALONE, Ranks
from ._sample import Sample, take_rows
from ._stop import holding
from .backends import check_has_kernels, choose, find_device
from .io.sources import Batch, Done, Source
from .methods import Parameters
from .moments import MappedMoments, Moments, OnBadRows, Precision, check_on_bad_rows


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
    num_reads
        How many there will be, for the progress.
    share
        What of all rows this process reads, for the progress.
    checkpoint
        Where to keep what has been read.

    Attributes
    ----------
    num_begun : int
        How many reads have begun.
    """

    def __init__(
        self,
        on_bad_rows: OnBadRows,
        num_threads: int | None = None,
        *,
        limit: int | None = None,
        progress: bool = False,
        num_reads: int = 1,
        share: str = "",
        checkpoint: Checkpoint | None = None,
    ) -> None:
        check_on_bad_rows(on_bad_rows)
        self._on_bad_rows: OnBadRows = on_bad_rows
        self._num_threads = num_threads
        self._limit = limit
        self._progress = progress
        self._num_reads = num_reads
        self._share = share
        self._checkpoint = checkpoint
        self.num_begun = 0

    def moments(self, source: Source, covariance: bool = False, precision: Precision = "high") -> Moments:
        """Return the moments of all rows, with their covariance where asked for.

        Raises
        ------
        BadRowsError
            A ValueError naming file and row, under "raise".
        """
        read = self._begin(Read(Moments(source.dim, covariance, precision)))

        def add(batch: Batch) -> None:
            read.moments.update_rows(batch.rows, self._on_bad_rows, self._num_threads)

        return self._read(source, read, add).moments

    def moments_and_sample(self, source: Source, covariance: bool = False) -> tuple[Moments, Sample]:
        """Return the moments of all rows, and some of them, chosen by their content; raises as `moments`."""
        read = self._begin(Read(Moments(source.dim, covariance), sample := self._new_sample(source)))
        sample = read.sample or sample
        memory = np.empty(0, np.uint64)  # kept: fresh pages for each batch would cost more than what is done with them

        def add(batch: Batch) -> None:
            nonlocal memory
            values = batch.rows.values
            if len(memory) < len(values):
                memory = np.empty(len(values), np.uint64)
            keys = memory[: len(values)]
            read.moments.update_rows(batch.rows, self._on_bad_rows, self._num_threads, keys)
            sample.add(keys, partial(take_rows, values))

        return self._read(source, read, add).moments, sample

    def transformed_moments(self, source: Source, parameters: Parameters) -> Moments:
        """Return the moments of what the map makes of all rows; raises as `moments`."""
        return finished(self.mapped(source, parameters), parameters)

    def mapped(self, source: Source, parameters: Parameters) -> Moments:
        """Return what `finished`, added to that of other rows first, makes the moments of all mapped rows."""
        read = self._begin(Read(MappedMoments(source.dim), map=hash_of(parameters)))
        moments = cast(MappedMoments, read.moments)
        affine = None if parameters.affine is None else parameters.affine.for_kernels

        def add(batch: Batch) -> None:
            moments.update_mapped(batch.rows, affine, parameters.row_map, self._on_bad_rows, self._num_threads)

        self._read(source, read, add)
        return moments

    def _begin(self, read: Read) -> Read:
        return read if self._checkpoint is None else self._checkpoint.begin(read)

    def _read(self, source: Source, read: Read, add: Callable[[Batch], None]) -> Read:
        number = None
        with self._showing(source, read.done) as advance:
            for batch in source.batches(self._limit, read.done):
                with holding():  # rows are in the read, and noted as such, or neither
                    with _located(batch):
                        add(batch)
                    read.done.rows[batch.number] = read.done.rows.get(batch.number, 0) + len(batch.rows.values)
                    if number not in (None, batch.number):
                        read.done.whole.add(number)
                    number = batch.number
                    if self._checkpoint is not None:
                        self._checkpoint.tick()
                advance(len(batch.rows.values))
        return read

    def _num_rows(self, source: Source) -> int | None:
        known = source.num_rows
        return known if known is None or self._limit is None else min(known, self._limit)

    def _new_sample(self, source: Source) -> Sample:
        return Sample(source.dim, source.dtype, self._num_rows(source))

    def _showing(self, source: Source, done: Done | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """Show the progress of one more read."""
        self.num_begun += 1
        which = f" ({self.num_begun} of {self._num_reads})" if self._num_reads > 1 else ""
        initial = 0 if done is None else source.num_rows_of(done)
        return show_progress(
            f"read {source.name}{which}{self._share}", self._num_rows(source), enabled=self._progress, initial=initial
        )


def finished(moments: Moments, parameters: Parameters) -> Moments:
    """Return the moments of all mapped rows, given what `Reader.mapped` found in them."""
    return moments.finished(parameters.row_map) if isinstance(moments, MappedMoments) else moments


class RanksReader(Reader):
    """Reads, in each of several processes, its share, adds up, and skips what a checkpoint holds already."""

    def __init__(self, reader: Reader, ranks: Ranks, checkpoint: Checkpoint | None) -> None:
        self._reader, self._ranks, self._checkpoint = reader, ranks, checkpoint

    def moments(self, source: Source, covariance: bool = False, precision: Precision = "high") -> Moments:
        """Return, in every process, the moments of all rows."""
        if (found := self._replay()) is not None:
            return found.moments
        moments = self._ranks.total(self._reader.moments(self._share_of(source), covariance, precision))
        self._finish(Read(moments))
        return moments

    def moments_and_sample(self, source: Source, covariance: bool = False) -> tuple[Moments, Sample]:
        """Return, in every process, the moments of all rows, and in the first the sample of one that reads them all."""
        if (found := self._replay()) is not None:
            return found.moments, found.sample or self._new_sample(source)
        moments, sample = self._reader.moments_and_sample(self._share_of(source), covariance)
        if self._ranks.size > 1:
            moments, part = self._ranks.total(moments), sample
            num_rows = sum(self._ranks.gather(part.num_seen))
            sample = Sample(source.dim, source.dtype, num_rows)
            part.expect(num_rows)
            for each in self._ranks.collect(part):
                sample.merge(each)
        self._finish(Read(moments, sample))
        return moments, sample

    def transformed_moments(self, source: Source, parameters: Parameters) -> Moments:
        """Return, in the first process, the moments of what its map makes of all rows; the others `follow`."""
        if self._checkpoint is not None and (found := self._checkpoint.replay(hash_of(parameters))) is not None:
            self._reader.num_begun += 1
            return found.moments
        number = 0 if self._checkpoint is None else self._checkpoint.number
        return self._transformed(source, self._ranks.broadcast(_Map(number, parameters)))

    def _transformed(self, source: Source, wanted: _Map) -> Moments:
        if self._checkpoint is not None:
            self._checkpoint.number = wanted.number
        of_map = hash_of(wanted.parameters)
        mine = self._share_of(source, of_map)
        moments = finished(self._ranks.total(self._reader.mapped(mine, wanted.parameters)), wanted.parameters)
        self._finish(Read(moments, map=of_map))
        return moments

    def follow(self, source: Source) -> Any:
        """Read `source` whenever the first process maps it; return what it broadcasts that is no map."""
        while isinstance(found := self._ranks.broadcast(None), _Map):
            self._transformed(source, found)
        return found

    def _share_of(self, source: Source, of_map: str = "") -> Source:
        if self._ranks.size == 1:
            return source
        return source.share(
            self._ranks, nothing_done() if self._checkpoint is None else self._checkpoint.done_before(of_map)
        )

    def _replay(self) -> Read | None:
        """Return, in every process, the next read if it is finished; samples are in the first alone."""
        if self._checkpoint is None:
            return None
        found = self._checkpoint.replay()
        if self._ranks.size > 1:
            moments = self._ranks.broadcast(None if found is None else found.moments)
            if moments is not None and found is None:
                self._checkpoint.number += 1
                found = Read(moments)
        self._reader.num_begun += found is not None
        return found

    def _finish(self, read: Read) -> None:
        if self._checkpoint is not None:
            self._checkpoint.finish(read)


class _Map(NamedTuple):
    """What all processes are to read next: the number of the read, and the map."""

    number: int
    parameters: Parameters


@contextmanager
def _located(batch: Batch) -> Iterator[None]:
    """Give a bad row the place of its batch."""
    try:
        yield
    except BadRowsError as error:
        batch.check()
        raise error.moved(batch.origin, batch.start) from None


def reader_for(
    backend: str,
    sources: tuple[Source, ...],
    *arguments: Any,
    ranks: Ranks = ALONE,
    checkpoint: Checkpoint | None = None,
    **options: Any,
) -> Reader:
    """Return what reads these sources: where they lie on one GPU, or where "triton" is asked for, there.

    Of several processes each reads its share of them (see `Source.share`).

    Raises
    ------
    ValueError
        If a backend asked for by name cannot run, several processes are to stop at a limit, or a read that is not kept
        is to be resumed.
    """
    if ranks.size > 1 and options.get("limit") is not None:
        raise ValueError("a limit needs the rows in order: read them in one process, without torchrun")
    options["share"] = ranks.label
    check_has_kernels(backend, "a fit")
    devices = {source.device for source in sources if source.device is not None}
    if len(devices) > 1:
        raise ValueError(f"text and image must be on one device, got {' and '.join(sorted(map(str, devices)))}")
    if backend == "triton" and not devices:
        devices = {find_device()}
    device = next(iter(devices), "cpu")
    reader: Reader
    if choose(backend, str(device), {source.dtype for source in sources}) == "triton":
        from ._gpu import DeviceReader

        if checkpoint is not None:
            checkpoint.disable("a GPU reads")
        reader = DeviceReader(device, *arguments, **options)
    else:
        reader = Reader(*arguments, checkpoint=checkpoint, **options)
    return reader if ranks.size == 1 and checkpoint is None else RanksReader(reader, ranks, checkpoint)
