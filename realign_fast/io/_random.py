"""Rows of many files by number, in any order, read where they lie.

They are read and not mapped: a file that is cut short meanwhile then is an error and no signal, and the memory of a
process does not grow with the rows that it has seen.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from .._dtypes import storage
from ._arrow import ArrowShard
from ._fingerprint import state_of
from ._npy import NpyShard
from ._raw import Layout
from ._safetensors import SafetensorsShard
from .formats import open_shard

_MAX_OPEN_FILES = 256


class RandomRows:
    """`num_rows` rows of npy, safetensors and uncompressed arrow files, numbered through all of them in order.

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

    def __init__(self, paths: list[Path], column: str | None = None) -> None:
        self.paths = paths
        self._states = [state_of(path) for path in paths]
        self.dim, self.dtype = 0, ""
        files: list[int] = []
        offsets: list[int] = []
        counts: list[int] = []
        for number, path in enumerate(paths):
            for layout in _layouts(path, column):
                if self.dim == 0:
                    self.dim, self.dtype = layout.dim, layout.dtype
                elif (layout.dim, layout.dtype) != (self.dim, self.dtype):
                    raise ValueError(
                        f"{path} has dimension {layout.dim} and dtype {layout.dtype}, {paths[0]} has {self.dim} and "
                        f"{self.dtype}"
                    )
                if layout.num_rows:
                    files.append(number)
                    offsets.append(layout.offset)
                    counts.append(layout.num_rows)
        if not counts:
            raise ValueError(f"{paths[0]}{' and the other files' if len(paths) > 1 else ''} hold no rows")
        self._files, self._offsets = np.array(files), np.array(offsets, np.int64)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._starts: NDArray[np.int64] = self._ends - np.array(counts, np.int64)
        self.num_rows = int(self._ends[-1])
        self.row_bytes = self.dim * storage(self.dtype).itemsize
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for fd in getattr(self, "_open", {}).values():
            os.close(fd)

    @property
    def stamp(self) -> list[list[Any]]:
        """What changes when a file does: name, size and time of change of each."""
        return [[path.name, *state] for path, state in zip(self.paths, self._states, strict=True)]

    def place(self, number: int) -> str:
        """Return where a row is: file and row."""
        piece = int(np.searchsorted(self._ends, number, side="right"))
        file = self._files[piece]
        before = self._starts[np.searchsorted(self._files, file)]
        return f"{self.paths[file]} row {number - before}"

    def read(self, numbers: NDArray[np.int64], out: NDArray[Any], num_threads: int = 1) -> None:
        """Copy the rows with these numbers `(n,)` into `out` `(n, dim)`, contiguous, in `storage(dtype)`.

        Raises
        ------
        IndexError
            If there is no such row.
        ValueError
            If a file has changed since this was made.
        """
        wrong = numbers[(numbers < 0) | (numbers >= self.num_rows)]
        if len(wrong):
            raise IndexError(f"row {wrong[0]} of {self.num_rows} rows")
        if len(numbers) == 1:  # without all that follows, in a third of its time
            self.read_range(int(numbers[0]), out)
            return
        pieces = np.searchsorted(self._ends, numbers, side="right")
        offsets = self._offsets[pieces] + (numbers - self._starts[pieces]) * self.row_bytes
        files, of_row = np.unique(self._files[pieces], return_inverse=True)
        for begin in range(0, len(files), _MAX_OPEN_FILES):
            some = files[begin : begin + _MAX_OPEN_FILES]
            fds = np.array([self._fd(int(file)) for file in some], np.int32)
            if len(some) == len(files):
                self._read(numbers, fds[of_row], offsets, out, num_threads)
            else:
                chosen = np.flatnonzero((of_row >= begin) & (of_row < begin + len(some)))
                part = np.empty((len(chosen), self.dim), out.dtype)
                self._read(numbers[chosen], fds[of_row[chosen] - begin], offsets[chosen], part, num_threads)
                out[chosen] = part

    def _read(
        self,
        numbers: NDArray[np.int64],
        fds: NDArray[np.int32],
        offsets: NDArray[np.int64],
        out: NDArray[Any],
        num_threads: int,
    ) -> None:
        first_short = _C.read_rows(fds, offsets, out, self.row_bytes, num_threads)
        if first_short < len(numbers):
            raise ValueError(f"{self.place(int(numbers[first_short]))}: the file was truncated while it was read")

    def read_range(self, start: int, out: NDArray[Any], num_threads: int = 1) -> None:
        """Copy the rows from number `start` on into `out` `(n, dim)`, as `read`."""
        done = 0
        while done < len(out):
            piece = int(np.searchsorted(self._ends, start + done, side="right"))
            part = out[done : int(self._ends[piece]) - start]
            offset = int(self._offsets[piece]) + (start + done - int(self._starts[piece])) * self.row_bytes
            file = int(self._files[piece])
            if _C.read_file(self._fd(file), part, offset, num_threads) < part.nbytes:
                raise ValueError(f"{self.paths[file]} was truncated while it was read")
            done += len(part)

    def _fd(self, file: int) -> int:
        fd = self._open.get(file)
        if fd is not None:
            self._open.move_to_end(file)
            return fd
        while len(self._open) >= _MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        fd = os.open(self.paths[file], os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(fd)
        if [status.st_size, status.st_mtime_ns] != self._states[file]:
            os.close(fd)
            raise ValueError(f"{self.paths[file]} has changed since it was opened: size or time of change differ")
        self._open[file] = fd
        return fd


def _layouts(path: Path, column: str | None) -> list[Layout]:
    shard = open_shard(path, column)
    if isinstance(shard, NpyShard | SafetensorsShard):
        layouts = [shard.layout]
    elif isinstance(shard, ArrowShard):
        layouts = shard.layouts()
    else:
        layouts = []
    if not layouts or any(layout.swapped or layout.fortran for layout in layouts):
        raise ValueError(
            f"{path}: its rows do not lie in it as in memory: make npy, safetensors or arrow files of them first, "
            "realign convert"
        )
    return layouts
