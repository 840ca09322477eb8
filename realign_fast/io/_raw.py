"""Rows that lie in a file as they lie in memory: npy, safetensors, and the buffers of arrow files."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._dtypes import Rows, storage
from .._native import _C, HAS_EXTENSION
from .._os import advise
from ._remote import AnyPath, FetchAhead, RemotePath

_PAGE = 4096
_AHEAD_BYTES = 16 << 20
# Mapped at once: small beside the memory of a machine, large enough that mapping does not count.
_WINDOW_BYTES = 64 << 20
# No encoder comes near; a header that claims more is damaged, and nothing may be sized after it.
MAX_DIM = 1 << 24
_MAX_ROWS = (1 << 63) - 1


def as_they_were() -> None:
    """Rows in memory do not change."""


class Chunk(NamedTuple):
    """Rows of one file from row `start` on, and what else the file holds of them.

    `columns` depends on the format: a pyarrow RecordBatch without the embeddings, a list of dicts with them, or None.
    `check` raises ValueError if the rows are not what the file held, since it was cut short: who finds something wrong
    in them asks first.
    """

    rows: Rows
    start: int
    columns: Any = None
    check: Callable[[], None] = as_they_were


class Blocks:
    """A ring of `count` reused blocks of memory, about `num_bytes` each, touched only when used.

    Files are read into them with `num_threads` threads: one alone copies from the page cache slower than memory can.
    What remote files hold comes through `ahead`.
    """

    def __init__(self, num_bytes: int, count: int, num_threads: int = 1, ahead: FetchAhead | None = None) -> None:
        self.num_bytes = num_bytes
        self.count = count
        self.num_threads = num_threads
        self._ahead = ahead or FetchAhead(())
        self._blocks: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * count
        self._next = 0

    def open(self, path: RemotePath) -> AbstractContextManager[io.RawIOBase]:
        """Open a remote file for a reading of its rows; see `FetchAhead.open`."""
        return self._ahead.open(path)

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

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The bytes that they take, begin and end."""
        size = self.num_rows * self.dim * storage(self.dtype).itemsize
        return [(self.offset, self.offset + size)]


def check_shape(path: AnyPath, num_rows: int, dim: int) -> None:
    """Raise ValueError for a shape that no file of embeddings has."""
    if not 0 <= num_rows <= _MAX_ROWS or not 1 <= dim <= MAX_DIM:
        raise ValueError(f"{path}: expected rows of dimension 1 to {MAX_DIM}, got shape ({num_rows}, {dim})")


# Fills an array from an offset of a file on, with so many threads.
_Fill = Callable[[NDArray[Any], int, int], None]


@contextmanager
def _open(path: AnyPath, blocks: Blocks) -> Iterator[_Fill]:
    if isinstance(path, RemotePath):
        with blocks.open(path) as remote:

            def fetch(values: NDArray[Any], offset: int, num_threads: int) -> None:
                remote.seek(offset)
                remote.readinto(values.data.cast("B"))

            yield fetch
        return
    with path.open("rb", buffering=0) as file:

        def read(values: NDArray[Any], offset: int, num_threads: int) -> None:
            if _C.read_file(file.fileno(), values, offset, num_threads) < values.nbytes:
                end = offset + values.nbytes
                raise ValueError(f"{path} was truncated while it was read: expected bytes up to {end}")

        yield read


def read_layout(path: AnyPath, layout: Layout, blocks: Blocks, first: int = 0) -> Generator[Chunk, None, None]:
    """Read the rows from row `first` on, a block at a time: where they lie if they can be used so, else copied."""
    aligned = layout.offset % storage(layout.dtype).itemsize == 0
    if HAS_EXTENSION and isinstance(path, Path) and aligned and not layout.swapped and not layout.fortran:
        return _mapped(path, layout, blocks, first)
    return _copied(path, layout, blocks, first)


def _mapped(path: Path, layout: Layout, blocks: Blocks, first: int) -> Generator[Chunk, None, None]:
    dtype = storage(layout.dtype)
    row_bytes = layout.dim * dtype.itemsize
    step = blocks.num_rows(row_bytes)
    window = max(1, _WINDOW_BYTES // (step * row_bytes)) * step
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        advise(fd, layout.offset, 0, "SEQUENTIAL")
        advise(fd, layout.offset + first * row_bytes, _AHEAD_BYTES, "WILLNEED")
        for begin in range(first, layout.num_rows, window):
            count = min(window, layout.num_rows - begin)
            offset = layout.offset + begin * row_bytes
            try:
                mapped = _C.FileMap(fd, offset, count * row_bytes)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                yield from _copied(path, layout, blocks, begin)  # its file system can read files, but not map them
                return
            rows = np.frombuffer(memoryview(mapped), dtype).reshape(count, layout.dim)
            check = partial(_check_whole, path, mapped, offset + count * row_bytes)
            for start in range(0, count, step):
                # The disk reads on while these rows are at work.
                ahead, size = offset + start * row_bytes + _AHEAD_BYTES, step * row_bytes
                if not _in_memory(fd, ahead, size):
                    advise(fd, ahead, size, "WILLNEED")
                yield Chunk(Rows(rows[start : start + step], layout.dtype), begin + start, check=check)
                check()


def _in_memory(fd: int, offset: int, size: int) -> bool:
    """Whether bytes of a file seem to lie in the page cache: the last of each quarter do, or the file ends before.

    To ask the kernel to read what it has costs it a walk over all the pages, a sixth of the time of a fit.
    """
    if not hasattr(os, "RWF_NOWAIT") or not hasattr(os, "preadv"):
        return False
    try:
        for quarter in range(1, 5):
            os.preadv(fd, [bytearray(1)], offset + size * quarter // 4 - 1, os.RWF_NOWAIT)
    except OSError:  # not there yet, or a file system that cannot say
        return False
    return True


def _check_whole(path: Path, mapped: _C.FileMap, end: int) -> None:
    # The last page of a file ends in zeros, which break no map. By its name: one that works ahead has closed the file.
    if path.stat().st_size < end:
        raise ValueError(f"{path} was truncated while it was read: expected bytes up to {end}")
    if mapped.broken:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def _copied(path: AnyPath, layout: Layout, blocks: Blocks, first: int) -> Generator[Chunk, None, None]:
    dtype = storage(layout.dtype)
    row_bytes = layout.dim * dtype.itemsize
    step = blocks.num_rows(row_bytes)
    with _open(path, blocks) as fill:
        for start in range(first, layout.num_rows, step):
            values = blocks.take(min(step, layout.num_rows - start), layout.dim, dtype)
            if layout.fortran:
                _read_columns(fill, layout, start, values)
            else:
                fill(values, layout.offset + start * row_bytes, blocks.num_threads)
            if layout.swapped:
                values.byteswap(inplace=True)
            yield Chunk(Rows(values, layout.dtype), start)


def _read_columns(fill: _Fill, layout: Layout, start: int, values: NDArray[Any]) -> None:
    columns = np.empty((layout.dim, len(values)), values.dtype)
    for index in range(layout.dim):
        offset = layout.offset + (index * layout.num_rows + start) * values.itemsize
        fill(columns[index], offset, 1)
    values[...] = columns.T
