"""Rows of many files by number, in any order, read where they lie, be that here or in a store.

They are read and not mapped: a file that is cut short meanwhile then is an error and no signal, and the memory of a
process does not grow with the rows that it has seen.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._dtypes import storage
from .._native import _C
from .._os import O_BINARY
from ._arrow import ArrowShard
from ._npy import NpyShard
from ._raw import Layout
from ._remote import AnyPath, RemotePath, read_into, state_of
from ._safetensors import SafetensorsShard
from ._tar import TarShard
from .formats import Shard, open_shards

_MAX_OPEN_FILES = 256
_SMALL_PIECE_ROWS = 16  # smaller ones are faster read row by row, all in one call

BadRows = tuple[int, int, int]
NONE_BAD: BadRows = (0, 0, -1)


class RandomRows:
    """`num_rows` rows of npy, safetensors, uncompressed arrow files and tars, numbered through all of them in order.

    Of a tar, every row is a piece of its own: 20 bytes in memory.

    Parameters
    ----------
    paths
        Files of one dimension and dtype.
    column
        As `io.formats.open_shard` takes it.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If a file is damaged, differs from the first, or its rows do not lie in it as in memory.
    """

    def __init__(self, paths: list[AnyPath], column: str | None = None) -> None:
        self.paths, self.column = paths, column
        self._states = [state_of(path) for path in paths]
        self.dim, self.dtype = 0, ""
        files: list[NDArray[np.int32]] = []
        offsets: list[NDArray[np.int64]] = []
        counts: list[NDArray[np.int64]] = []
        for number, (path, shard) in enumerate(zip(paths, open_shards(paths, column), strict=True)):
            pieces = _pieces_of(shard)
            if self.dim == 0:
                self.dim, self.dtype = pieces.dim, pieces.dtype
            elif pieces.dim and (pieces.dim, pieces.dtype) != (self.dim, self.dtype):
                raise ValueError(
                    f"{path} has dimension {pieces.dim} and dtype {pieces.dtype}, {paths[0]} has {self.dim} and "
                    f"{self.dtype}"
                )
            has_rows = pieces.counts > 0
            files.append(np.full(int(has_rows.sum()), number, np.int32))
            offsets.append(pieces.offsets[has_rows])
            counts.append(pieces.counts[has_rows])
        self._files, self._offsets = np.concatenate(files), np.concatenate(offsets)
        if not len(self._files):
            raise ValueError(f"{paths[0]}{' and the other files' if len(paths) > 1 else ''} hold no rows")
        self._ends = np.cumsum(np.concatenate(counts), dtype=np.int64)
        self.num_rows = int(self._ends[-1])
        self.row_bytes = self.dim * storage(self.dtype).itemsize
        self._bfloat16 = self.dtype == "bfloat16"
        self._remote = any(isinstance(path, RemotePath) for path in paths)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._checked: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_checked": set()}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Bound above: where the process ends, this module may have lost its names.
        for fd in getattr(self, "_open", {}).values():
            close(fd)

    @property
    def stamp(self) -> list[list[Any]]:
        """What changes when a file does: name, size and time of change of each."""
        return [[path.name, *state] for path, state in zip(self.paths, self._states, strict=True)]

    def place(self, number: int) -> str:
        """Return where a row is: file and row."""
        file = int(self._files[np.searchsorted(self._ends, number, side="right")])
        before = self._starts_of(np.searchsorted(self._files, [file]))[0]
        return f"{self.paths[file]} row {number - before}"

    def rows_of_files(self) -> list[int]:
        """Return how many rows each file has."""
        ends = np.searchsorted(self._files, np.arange(len(self.paths)), side="right")
        counts: list[int] = np.diff(self._starts_of(ends), prepend=0).tolist()
        return counts

    def _starts_of(self, pieces: NDArray[np.intp]) -> NDArray[np.int64]:
        """Return the numbers of their first rows."""
        return np.where(pieces > 0, self._ends[pieces - 1], 0)

    def read(
        self, numbers: NDArray[np.int64], out: NDArray[Any], num_threads: int = 1, row_map: _C.RowMap | None = None
    ) -> BadRows:
        """Copy the rows with these numbers `(n,)` into `out` `(n, dim)`, contiguous, in `storage(dtype)`.

        With a `row_map` they are mapped while they are in the cache; what it returns are the bad rows among them, as
        `_C.row_transform` says: how many are zero, how many are not finite, and the first.

        Raises
        ------
        IndexError
            If there is no such row.
        ValueError
            If a file has changed since this was made.
        OSError
            If a store refuses, or still fails after some tries.
        """
        if len(numbers) == 1:  # without all that follows, in a third of its time
            return self.read_range(int(numbers[0]), out, 1, row_map)
        wrong = numbers[(numbers < 0) | (numbers >= self.num_rows)]
        if len(wrong):
            raise IndexError(f"row {wrong[0]} of {self.num_rows} rows")
        if self._remote:
            begins = np.flatnonzero(np.append(True, np.diff(numbers) != 1))
            ends = np.append(begins[1:], len(numbers))
            ranges = [(int(numbers[begin]), out[begin:end]) for begin, end in zip(begins, ends, strict=True)]
            self.read_ranges(ranges, num_threads)
            return self.map(out, row_map, num_threads)
        pieces = np.searchsorted(self._ends, numbers, side="right")
        offsets = self._offsets[pieces] + (numbers - self._starts_of(pieces)) * self.row_bytes
        files, of_row = np.unique(self._files[pieces], return_inverse=True)
        if len(files) <= _MAX_OPEN_FILES:
            return self._read(numbers, files, of_row, offsets, out, num_threads, row_map)
        for begin in range(0, len(files), _MAX_OPEN_FILES):
            some = files[begin : begin + _MAX_OPEN_FILES]
            chosen = np.flatnonzero((of_row >= begin) & (of_row < begin + len(some)))
            part = np.empty((len(chosen), self.dim), out.dtype)
            self._read(numbers[chosen], some, of_row[chosen] - begin, offsets[chosen], part, num_threads, None)
            out[chosen] = part
        return self.map(out, row_map, num_threads)

    def _read(
        self,
        numbers: NDArray[np.int64],
        files: NDArray[np.int32],
        of_row: NDArray[np.intp],
        offsets: NDArray[np.int64],
        out: NDArray[Any],
        num_threads: int,
        row_map: _C.RowMap | None,
    ) -> BadRows:
        fds = np.array([self._fd(int(file)) for file in files], np.int32)[of_row]
        bad = NONE_BAD
        if row_map is None:
            num_read = _C.read_rows(fds, offsets, out, self.row_bytes, num_threads)
        else:
            num_read, *found = _C.read_rows_transform(fds, offsets, out, self._bfloat16, row_map, num_threads)
            bad = found[0], found[1], found[2]
        if num_read < len(numbers):
            raise ValueError(f"{self.place(int(numbers[num_read]))}: the file was truncated while it was read")
        return bad

    def map(self, rows: NDArray[Any], row_map: _C.RowMap | None, num_threads: int) -> BadRows:
        """Map rows in their place, if there is a map; return the bad ones among them."""
        if row_map is None:
            return NONE_BAD
        return _C.row_transform(rows, self._bfloat16, rows, self._bfloat16, row_map, num_threads)

    def take(
        self,
        buffer: NDArray[Any],
        places: NDArray[np.int64],
        out: NDArray[Any],
        num_threads: int = 1,
        row_map: _C.RowMap | None = None,
    ) -> BadRows:
        """Copy the rows at these places `(n,)` of a buffer `(m, dim)` into `out` `(n, dim)`, as `read`."""
        return _C.take_rows(buffer, self._bfloat16, places, out, row_map, num_threads)

    def read_range(
        self, start: int, out: NDArray[Any], num_threads: int = 1, row_map: _C.RowMap | None = None
    ) -> BadRows:
        """Copy the rows from number `start` on into `out` `(n, dim)`, as `read`."""
        if not 0 <= start <= self.num_rows - len(out):
            raise IndexError(f"row {start} of {self.num_rows} rows")
        file, offset, count = self._place_of(start)
        if self._remote or count < len(out):
            self.read_ranges([(start, out)], num_threads)
            return self.map(out, row_map, num_threads)
        bad, fd = NONE_BAD, self._fd(file)
        if row_map is None:
            is_whole = _C.read_file(fd, out, offset, num_threads) == out.nbytes
        else:
            num_read, *found = _C.read_file_transform(fd, offset, out, self._bfloat16, row_map, num_threads)
            bad, is_whole = (found[0], found[1], found[2]), num_read == len(out)
        if not is_whole:
            raise ValueError(f"{self.paths[file]} was truncated while it was read")
        return bad

    def _place_of(self, number: int) -> tuple[int, int, int]:
        """Return the file of a row, its offset there, and how many rows follow one another from it on."""
        # Through their memory, whose elements are ints of Python: NumPy's own search takes twice as long for one row.
        ends = self._ends.data
        piece = bisect_right(ends, number)
        before = ends[piece - 1] if piece else 0
        offset = self._offsets.data[piece] + (number - before) * self.row_bytes
        return self._files.data[piece], offset, ends[piece] - number

    def read_ranges(self, ranges: list[tuple[int, NDArray[Any]]], num_threads: int = 1) -> None:
        """Copy the rows from each number on into its array `(n, dim)`, as `read`; from a store, many at once."""
        requests = []
        for start, out in ranges:
            if self._in_small_pieces(start, len(out)):
                self.read(np.arange(start, start + len(out)), out, num_threads)
                continue
            done = 0
            while done < len(out):
                file, offset, count = self._place_of(start + done)
                part = out[done : done + count]
                path = self.paths[file]
                if isinstance(path, RemotePath):
                    self._check_once(file, path)
                    requests.append((path, offset, part.data.cast("B")))
                elif _C.read_file(self._fd(file), part, offset, num_threads) < part.nbytes:
                    raise ValueError(f"{path} was truncated while it was read")
                done += len(part)
        read_into(requests)

    def _in_small_pieces(self, start: int, count: int) -> bool:
        if count < 2 or self._remote:
            return False
        first, last = np.searchsorted(self._ends, [start, start + count - 1], side="right")
        return bool(last - first > count // _SMALL_PIECE_ROWS)

    def _check_once(self, file: int, path: RemotePath) -> None:
        if file not in self._checked:
            path.check()
            self._checked.add(file)

    def _fd(self, file: int) -> int:
        fd = self._open.get(file)
        if fd is not None:
            self._open.move_to_end(file)
            return fd
        while len(self._open) >= _MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        fd = os.open(str(self.paths[file]), os.O_RDONLY | O_BINARY)
        status = os.fstat(fd)
        if [status.st_size, status.st_mtime_ns] != self._states[file]:
            os.close(fd)
            raise ValueError(f"{self.paths[file]} has changed since it was opened: size or time of change differ")
        self._open[file] = fd
        return fd


class _Pieces(NamedTuple):
    """Rows of a file that lie one after the other: where each piece begins and how many rows it has.

    The dimension is 0 where a tar without samples states none.
    """

    dim: int
    dtype: str
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]


def _pieces_of(shard: Shard) -> _Pieces:
    layouts: list[Layout] = []
    if isinstance(shard, TarShard):
        tar = shard.load()
        if not tar.swapped.any():
            return _Pieces(tar.dim, tar.dtype, tar.values, np.ones(tar.num_rows, np.int64))
    elif isinstance(shard, NpyShard | SafetensorsShard):
        layouts = [shard.layout]
    elif isinstance(shard, ArrowShard):
        layouts = shard.layouts()
    if not layouts or any(layout.swapped or layout.fortran for layout in layouts):
        raise ValueError(
            f"{shard.path}: its rows do not lie in it as in memory: make npy, safetensors or arrow files of them "
            "first, realign convert"
        )
    offsets = np.array([layout.offset for layout in layouts], np.int64)
    counts = np.array([layout.num_rows for layout in layouts], np.int64)
    return _Pieces(layouts[0].dim, layouts[0].dtype, offsets, counts)
