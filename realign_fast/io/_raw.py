"""Rows that lie in a file as they lie in memory: npy, safetensors, and the buffers of arrow files."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _C
from .._dtypes import Rows, storage

_PAGE = 4096
_AHEAD_BYTES = 16 << 20
# No encoder comes near; a header that claims more is damaged, and nothing may be sized after it.
MAX_DIM = 1 << 24
_MAX_ROWS = (1 << 63) - 1


class Chunk(NamedTuple):
    """Rows of one file from row `start` on, and what else the file holds of them.

    `columns` depends on the format: a pyarrow RecordBatch without the embeddings, a list of dicts with them, or None.
    """

    rows: Rows
    start: int
    columns: Any = None


class Blocks:
    """A ring of `count` reused blocks of memory, about `num_bytes` each, touched only when used.

    Files are read into them with `num_threads` threads: one alone copies from the page cache slower than memory can.
    """

    def __init__(self, num_bytes: int, count: int, num_threads: int = 1) -> None:
        self.num_bytes = num_bytes
        self.count = count
        self.num_threads = num_threads
        self._blocks: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * count
        self._next = 0

    def num_rows(self, row_bytes: int) -> int:
        """Return how many rows of `row_bytes` a block takes, at least one."""
        return max(1, self.num_bytes // max(1, row_bytes))

    def take(self, num_rows: int, dim: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the next block as an uninitialised `(num_rows, dim)` array that begins on a page."""
        needed = num_rows * dim * dtype.itemsize
        block = self._blocks[self._next]
        if block.nbytes < needed:
            memory = np.empty(max(needed, self.num_bytes) + _PAGE, np.uint8)
            block = self._blocks[self._next] = memory[-memory.ctypes.data % _PAGE :]
        self._next = (self._next + 1) % self.count
        return block[:needed].view(dtype).reshape(num_rows, dim)


class Layout(NamedTuple):
    """Where `(num_rows, dim)` values of `dtype` lie in a file."""

    offset: int
    num_rows: int
    dim: int
    dtype: str
    swapped: bool = False
    fortran: bool = False


def check_shape(path: Path, num_rows: int, dim: int) -> None:
    """Raise ValueError for a shape that no file of embeddings has."""
    if not 0 <= num_rows <= _MAX_ROWS or not 1 <= dim <= MAX_DIM:
        raise ValueError(f"{path}: expected rows of dimension 1 to {MAX_DIM}, got shape ({num_rows}, {dim})")


def read_layout(path: Path, layout: Layout, blocks: Blocks, first: int = 0) -> Generator[Chunk, None, None]:
    """Read the rows, from row `first` on, block after block."""
    dtype = storage(layout.dtype)
    step = blocks.num_rows(layout.dim * dtype.itemsize)
    with path.open("rb", buffering=0) as file:
        fd, row_bytes = file.fileno(), layout.dim * dtype.itemsize
        if not layout.fortran:
            offset = layout.offset + first * row_bytes
            os.posix_fadvise(fd, offset, 0, os.POSIX_FADV_SEQUENTIAL)
            os.posix_fadvise(fd, offset, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        for start in range(first, layout.num_rows, step):
            if not layout.fortran:  # the disk reads on while this block is at work
                ahead = layout.offset + start * row_bytes + _AHEAD_BYTES
                os.posix_fadvise(fd, ahead, step * row_bytes, os.POSIX_FADV_WILLNEED)
            values = blocks.take(min(step, layout.num_rows - start), layout.dim, dtype)
            if layout.fortran:
                _read_columns(path, fd, layout, start, values)
            else:
                _read_into(path, fd, layout.offset + start * row_bytes, values, blocks.num_threads)
            if layout.swapped:
                values.byteswap(inplace=True)
            yield Chunk(Rows(values, layout.dtype), start)


def _read_columns(path: Path, fd: int, layout: Layout, start: int, values: NDArray[Any]) -> None:
    columns = np.empty((layout.dim, len(values)), values.dtype)
    for index in range(layout.dim):
        offset = layout.offset + (index * layout.num_rows + start) * values.itemsize
        _read_into(path, fd, offset, columns[index], 1)
    values[...] = columns.T


def _read_into(path: Path, fd: int, offset: int, values: NDArray[Any], num_threads: int) -> None:
    """Fill contiguous `values` from `offset`; ValueError where the file ends before."""
    if _C.read_file(fd, values, offset, num_threads) < values.nbytes:
        raise ValueError(f"{path} was truncated while it was read: expected bytes up to {offset + values.nbytes}")
