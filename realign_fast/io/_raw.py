"""Rows that lie in a file as they lie in memory: npy, safetensors, and the buffers of arrow files."""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import _C
from .._dtypes import Rows, storage
from ._remote import AnyPath, FetchAhead, RemotePath

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


class _Reader(Protocol):
    """Reads an open file: `fill` from an offset, having been told by `expect` what will be read."""

    def expect(self, begin: int, size: int) -> None: ...
    def fill(self, values: NDArray[Any], offset: int, num_threads: int) -> None: ...


class _LocalReader:
    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd

    def expect(self, begin: int, size: int) -> None:
        os.posix_fadvise(self._fd, begin, size, os.POSIX_FADV_WILLNEED)

    def fill(self, values: NDArray[Any], offset: int, num_threads: int) -> None:
        if _C.read_file(self._fd, values, offset, num_threads) < values.nbytes:
            raise ValueError(
                f"{self._path} was truncated while it was read: expected bytes up to {offset + values.nbytes}"
            )


class _RemoteReader:
    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file

    def expect(self, begin: int, size: int) -> None:
        pass  # what reads ahead has a plan of its own

    def fill(self, values: NDArray[Any], offset: int, num_threads: int) -> None:
        self._file.seek(offset)
        self._file.readinto(values.data.cast("B"))


@contextmanager
def _open(path: AnyPath, blocks: Blocks, *, in_order: bool) -> Iterator[_Reader]:
    if isinstance(path, RemotePath):
        with blocks.open(path) as remote:
            yield _RemoteReader(remote)
        return
    with path.open("rb", buffering=0) as file:
        if in_order:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield _LocalReader(path, file.fileno())


def read_layout(path: AnyPath, layout: Layout, blocks: Blocks) -> Generator[Chunk, None, None]:
    """Read the rows block after block."""
    dtype = storage(layout.dtype)
    row_bytes = layout.dim * dtype.itemsize
    step = blocks.num_rows(row_bytes)
    with _open(path, blocks, in_order=not layout.fortran) as reader:
        if not layout.fortran:
            reader.expect(layout.offset, _AHEAD_BYTES)
        for start in range(0, layout.num_rows, step):
            values = blocks.take(min(step, layout.num_rows - start), layout.dim, dtype)
            if layout.fortran:
                _read_columns(reader, layout, start, values)
            else:
                begin = layout.offset + start * row_bytes
                reader.expect(begin + _AHEAD_BYTES, step * row_bytes)  # the disk reads on while this block is at work
                reader.fill(values, begin, blocks.num_threads)
            if layout.swapped:
                values.byteswap(inplace=True)
            yield Chunk(Rows(values, layout.dtype), start)


def _read_columns(reader: _Reader, layout: Layout, start: int, values: NDArray[Any]) -> None:
    columns = np.empty((layout.dim, len(values)), values.dtype)
    for index in range(layout.dim):
        offset = layout.offset + (index * layout.num_rows + start) * values.itemsize
        reader.fill(columns[index], offset, 1)
    values[...] = columns.T
