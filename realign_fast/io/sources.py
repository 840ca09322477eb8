"""Whatever a caller hands in, seen as batches of rows and where each came from."""

from __future__ import annotations

import copy
import glob
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .._dtypes import Rows, storage
from .._ranks import Ranks
from .._rows import as_rows, dtype_name, is_tensor
from ..backends import count_threads
from ._fingerprint import combined, fingerprint
from ._layouts import listed_files, side_of
from ._prefetch import prefetch
from ._raw import Blocks, as_they_were
from ._remote import AnyPath, FetchAhead, RemotePath, is_url, list_files, state_of
from .formats import FORMATS, Shard, chunks_from, format_of, is_compressed_tar, open_shards, plan, unknown

# Small enough that a kernel finds in the last-level cache what the reader has just copied there, even where three
# blocks are in flight; large enough to be worth several threads.
BATCH_BYTES = 4 << 20
_DEPTH = 3
# So many times larger are batches of rows that are read where they lie, which need not stay in a cache: between two of
# them the cores wait for each other and for Python.
_UNCOPIED = 16
MANIFEST = "realign-manifest.json"
# Holds what a file of the same stem could not: see io.writer.
SIDECAR = ".columns"


class Batch(NamedTuple):
    """Rows of a source. Their memory is reused: they are valid until the next batch is asked for.

    Attributes
    ----------
    rows : Rows
    origin : str
        Path of the file, or the source's name for arrays and batches in memory.
    start : int
        Index of `rows[0]` within `origin`.
    number : int
        Of the file among all of the source.
    check : callable
        As that of `Chunk`.
    """

    rows: Rows
    origin: str
    start: int
    number: int = 0
    check: Callable[[], None] = as_they_were


class Done(NamedTuple):
    """How far a set of files has been read.

    Attributes
    ----------
    rows : dict
        How many rows of a file, by its number.
    whole : set
        The numbers of files that have been read to their end.
    """

    rows: dict[int, int]
    whole: set[int]

    def copy(self) -> Done:
        """Return an independent copy."""
        return Done(dict(self.rows), set(self.whole))


NOTHING = Done({}, set())


class Source(ABC):
    """A set of embeddings that is read in batches.

    Attributes
    ----------
    name : str
        What errors call it, such as "text".
    dim : int
    dtype : str
        One of `DTYPES`.
    num_rows : int or None
        None where only reading tells.
    reiterable : bool
        Whether `batches` can be called more than once.
    device : torch.device or None
        Where the rows lie, if not in host memory.
    in_files : bool
        Whether it is a set of files, of which parts can be read again.
    """

    name: str
    dim: int
    dtype: str
    num_rows: int | None
    reiterable: bool = True
    device: Any = None
    in_files: bool = False

    @abstractmethod
    def batches(self, limit: int | None = None, done: Done = NOTHING) -> Iterator[Batch]:
        """Yield all rows in order, or the first `limit`; empty batches are left out.

        Of files what is `done` is left out, but counted; only they can be begun so.

        Raises
        ------
        ValueError
            If a file is damaged, has changed since the source was opened, or a batch has another dimension or dtype
            than the first.
        """

    def share(self, ranks: Ranks, done: Done = NOTHING) -> Source:
        """Return what this process reads of it: of files whole ones, divided by the sizes of what is not `done`.

        Raises
        ------
        ValueError
            If it lies in memory and there are other processes, or they see other files.
        """
        if ranks.size > 1:
            raise ValueError(f"{self.name} lies in memory: pass files, which can be divided over processes")
        return self

    def fingerprint(self) -> str | None:
        """Return a hash of the files' sizes, times, headers and sampled blocks; None for data in memory."""
        inputs = self.inputs()
        return None if inputs is None else combined([print_of_one for _, print_of_one in inputs])

    def inputs(self) -> list[tuple[str, str]] | None:
        """Return name and fingerprint of each file; None for data in memory."""
        return None

    def num_rows_of(self, done: Done) -> int:
        """Return how many of its rows are done."""
        return 0

    def folders(self) -> set[Path]:
        """Return the folders in which its local files lie."""
        return set()

    def __repr__(self) -> str:
        rows = "?" if self.num_rows is None else self.num_rows
        return f"{type(self).__name__}({self.name!r}, {rows} x {self.dim} {self.dtype})"


def open_source(
    data: object,
    *,
    name: str,
    key: str | None = None,
    column: str | None = None,
    side: Literal["source", "target"] | None = None,
    batch_bytes: int = BATCH_BYTES,
    num_threads: int | None = None,
) -> Source:
    """Return a source of the rows in `data`.

    Parameters
    ----------
    data
        An array or tensor `(..., dim)` of float16, bfloat16, float32 or float64; a path, glob or directory, or a list
        of such; or an iterable of batches, each an array, a tensor or a dict that holds one under `key`.
    name
        What errors call it.
    key
        Where the embeddings lie in dict batches.
    column
        Which column of a table, tensor of a safetensors file or key of a pickle holds the embeddings: by default
        "embedding", in pickles also "embed", in safetensors also the only 2-D float tensor. In tars, the extension of
        their members; by default the only `.npy` of a sample.
    side
        Which side of a folder that holds both is meant.
    batch_bytes
        About how large a batch is.
    num_threads
        That read a file; by default the cores this process may use.

    Raises
    ------
    FileNotFoundError
        If a path, or any match of a glob, is missing, or a directory is empty.
    TypeError
        If `data` is none of these, or of another dtype.
    ValueError
        If a file is damaged, shapes or dtypes differ, or there is nothing to read.
    """
    if batch_bytes < 1:
        raise ValueError(f"batch_bytes must be at least 1, got {batch_bytes}")
    if isinstance(data, np.ndarray) or is_tensor(data):
        return _ArraySource(data, name, batch_bytes)
    if _is_path(data) or (isinstance(data, list | tuple) and data and all(_is_path(item) for item in data)):
        return _FileSource(file_paths(data, side), name, column, batch_bytes, count_threads(num_threads))
    if isinstance(data, list | tuple):
        if not data:
            raise ValueError(f"{name} is an empty {type(data).__name__}: expected paths or batches")
        if not all(isinstance(item, np.ndarray | Mapping) or is_tensor(item) for item in data):
            raise TypeError(f"{name} is a {type(data).__name__} of numbers or rows: pass numpy.asarray({name})")
    if isinstance(data, Iterable) and not isinstance(data, bytes | bytearray | Mapping):
        return _IterableSource(data, name, key, batch_bytes)
    expected = "an array, a tensor, a path, a list of paths or an iterable of batches"
    raise TypeError(f"{name} must be {expected}, got {type(data).__name__}")


def _is_path(data: object) -> bool:
    return isinstance(data, str | os.PathLike)


def check_array(x: Any, name: str) -> Any:
    """Return `x`, an array or tensor, if it can be rows of shape `(..., dim)`; raise as `open_source` does if not."""
    dtype_name(x.dtype, name=f"{name}.dtype")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: fill it first")
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., dim) with at least two axes, got {tuple(x.shape)}")
    return x


def _blocks_of(x: Any, num_rows: int) -> Iterator[Any]:
    """Cut `x` `(..., dim)` along its first axes into parts of at most `num_rows` rows: only parts get copied."""
    inner = math.prod(x.shape[1:-1])
    if inner > num_rows:
        for part in x:
            yield from _blocks_of(part, num_rows)
    elif inner:
        step = num_rows // inner
        for start in range(0, len(x), step):
            yield x[start : start + step]


class MemorySource(Source):
    """Arrays or tensors; those on a device can be had as they are."""

    _batch_bytes: int

    @abstractmethod
    def parts(self, batch_bytes: int) -> Iterator[tuple[Any, str]]:
        """Yield arrays or tensors `(..., dim)` of about `batch_bytes`, and what errors call each."""

    def batches(self, limit: int | None = None, done: Done = NOTHING) -> Iterator[Batch]:
        """Yield all rows in order, or the first `limit`, in host memory."""
        start = 0
        for part, name in self.parts(self._batch_bytes):
            if limit is not None and start >= limit:
                return
            rows = _first(as_rows(part, name=name, dim=self.dim), limit, start)
            if len(rows.values):
                yield Batch(rows, self.name, start)
                start += len(rows.values)

    def _cut(self, x: Any, batch_bytes: int) -> Iterator[Any]:
        return _blocks_of(x, max(1, batch_bytes // (self.dim * storage(self.dtype).itemsize)))


class _ArraySource(MemorySource):
    def __init__(self, x: Any, name: str, batch_bytes: int) -> None:
        check_array(x, name)
        as_rows(x[:0], name=name)  # what else a tensor can have against it
        self.name = name
        self.dim = int(x.shape[-1])
        self.dtype = dtype_name(x.dtype)
        self.num_rows = math.prod(x.shape[:-1])
        self.device = _device_of(x)
        self._x = x
        self._batch_bytes = batch_bytes

    def parts(self, batch_bytes: int) -> Iterator[tuple[Any, str]]:
        for part in self._cut(self._x, batch_bytes):
            yield part, self.name


class _IterableSource(MemorySource):
    num_rows = None

    def __init__(self, data: Iterable[object], name: str, key: str | None, batch_bytes: int) -> None:
        self.name = name
        self._data = data
        self._key = key
        self._batch_bytes = batch_bytes
        iterator = iter(data)
        self.reiterable = iterator is not data
        try:
            first = next(iterator)
        except StopIteration:
            raise ValueError(f"{name} yields no batch") from None
        x = self._array(first, 0)
        self.dim = int(x.shape[-1])
        self.dtype = dtype_name(x.dtype)
        self.device = _device_of(x)
        # The batch looked at is not asked for twice.
        self._begun: Iterator[object] | None = chain([first], iterator)

    def _array(self, item: object, index: int) -> Any:
        name = f"batch {index} of {self.name}"
        if isinstance(item, Mapping):
            if self._key is None or self._key not in item:
                wanted = "pass key=" if self._key is None else f"no {self._key!r}"
                raise ValueError(f"{name} is a dict: {wanted}; its keys are {list(item)}")
            item = item[self._key]
        if not isinstance(item, np.ndarray) and not is_tensor(item):
            raise TypeError(f"{name} must be an array, a tensor or a dict of such, got {type(item).__name__}")
        return check_array(item, name)

    def parts(self, batch_bytes: int) -> Iterator[tuple[Any, str]]:
        items, self._begun = self._begun, None
        if items is None:
            if not self.reiterable:
                raise ValueError(
                    f"{self.name} is a generator or iterator, which can be read once: "
                    "pass an array, paths, or an object whose __iter__ begins anew"
                )
            items = iter(self._data)
        return self._parts(items, batch_bytes)

    def _parts(self, items: Iterator[object], batch_bytes: int) -> Iterator[tuple[Any, str]]:
        for index, item in enumerate(items):
            x = self._array(item, index)
            if (x.shape[-1], dtype_name(x.dtype), _device_of(x)) != (self.dim, self.dtype, self.device):
                raise ValueError(
                    f"batch {index} of {self.name} has dimension {x.shape[-1]} and dtype {dtype_name(x.dtype)}"
                    f"{_on(_device_of(x))}, batch 0 has {self.dim} and {self.dtype}{_on(self.device)}"
                )
            for part in self._cut(x, batch_bytes):
                yield part, f"batch {index} of {self.name}"


def _device_of(x: Any) -> Any:
    return x.device if is_tensor(x) and not x.is_cpu else None


def _on(device: Any) -> str:
    return "" if device is None else f" on {device}"


class _FileSource(Source):
    in_files = True

    def __init__(self, paths: list[AnyPath], name: str, column: str | None, batch_bytes: int, num_threads: int) -> None:
        self.name = name
        self._paths = paths
        # Before anything is read: what is read later must be of the same file.
        self._states = [state_of(path) for path in paths]
        self._shards = dict(enumerate(open_shards(paths, column)))
        self._inputs: list[tuple[str, str]] | None = None
        self._batch_bytes = batch_bytes
        self._num_threads = num_threads
        self.num_rows = _sum_of(shard.num_rows for shard in self._shards.values())
        self.dim, self.dtype = 0, ""
        self._first: AnyPath | str = paths[0]
        for shard in self._shards.values():
            self._check(shard.path, shard.dim, shard.dtype)
        if self.dim == 0:
            for batch in self.batches(limit=1):
                self._check(batch.origin, batch.rows.values.shape[1], batch.rows.dtype)
        if self.dim == 0:
            raise ValueError(f"{name}: {paths[0]}{' and the other files' if len(paths) > 1 else ''} hold no rows")

    def _check(self, path: AnyPath | str, dim: int, dtype: str) -> None:
        if dim == 0:
            return
        if self.dim == 0:
            self.dim, self.dtype, self._first = dim, dtype, path
        elif (dim, dtype) != (self.dim, self.dtype):
            raise ValueError(
                f"{path} has dimension {dim} and dtype {dtype}, {self._first} has {self.dim} and {self.dtype}"
            )

    def batches(self, limit: int | None = None, done: Done = NOTHING) -> Iterator[Batch]:
        # Rows that lie as they are used are read by all threads at once, while the system fetches on from the disk.
        # Those that must be decoded or fetched come from a thread that works ahead.
        works_ahead = any(shard.decoded or isinstance(shard.path, RemotePath) for shard in self._shards.values())
        depth = _DEPTH if works_ahead else 1
        batches = self._batches(limit, done.copy(), self._batch_bytes * (1 if works_ahead else _UNCOPIED), depth)
        return prefetch(batches, depth) if works_ahead else batches

    def _batches(self, limit: int | None, done: Done, num_bytes: int, depth: int) -> Generator[Batch, None, None]:
        total = sum(done.rows.values())
        left = [(number, done.rows.get(number, 0)) for number in self._shards if number not in done.whole]
        with closing(FetchAhead(plan((self._shards[number], begin) for number, begin in left))) as ahead:
            blocks = Blocks(num_bytes, depth, self._num_threads, ahead)
            for number, begin in left:
                shard = self._shards[number]
                for chunk in chunks_from(shard, blocks, begin):
                    rows = _first(chunk.rows, limit, total)
                    if not len(rows.values):
                        return
                    self._check(shard.path, rows.values.shape[1], rows.dtype)
                    total += len(rows.values)
                    yield Batch(rows, str(shard.path), chunk.start, number, chunk.check)
                self._check_unchanged(number)

    def share(self, ranks: Ranks, done: Done = NOTHING) -> Source:
        mine = copy.copy(self)
        left = [
            0 if number in done.whole else _size_left(state[0], shard, done.rows.get(number, 0))
            for (number, shard), state in zip(self._shards.items(), self._states, strict=True)
        ]
        mine._shards = {number: self._shards[number] for number in ranks.share(left)}
        mine.num_rows = _sum_of(shard.num_rows for shard in mine._shards.values())
        return mine

    def num_rows_of(self, done: Done) -> int:
        return sum(done.rows.get(number, 0) for number in self._shards)

    def folders(self) -> set[Path]:
        return {path.parent for path in self._paths if isinstance(path, Path)}

    def inputs(self) -> list[tuple[str, str]] | None:
        if self._inputs is None:
            self._inputs = [(path.name, fingerprint(path)) for path in self._paths]
            for number in range(len(self._paths)):
                self._check_unchanged(number)
        return self._inputs

    def _check_unchanged(self, number: int) -> None:
        path = self._paths[number]
        if state_of(path) != self._states[number]:
            raise ValueError(f"{path} has changed while it was read: start again once nothing writes to it")


def _size_left(num_bytes: int, shard: Shard, num_rows_done: int) -> int:
    return num_bytes * (shard.num_rows - num_rows_done) // shard.num_rows if shard.num_rows else num_bytes


def _first(rows: Rows, limit: int | None, done: int) -> Rows:
    return rows if limit is None else Rows(rows.values[: max(0, limit - done)], rows.dtype)


def count_rows(paths: list[AnyPath], column: str | None = None) -> int | None:
    """Return how many rows the headers of `paths` state; None where only reading a file tells."""
    return _sum_of(shard.num_rows for shard in open_shards(paths, column))


def _sum_of(counts: Iterable[int | None]) -> int | None:
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


def file_paths(data: Any, side: Literal["source", "target"] | None = None) -> list[AnyPath]:
    """Return the files that a path, a glob, a directory, a URL of such or a list of these stands for.

    The contents of a directory and the matches of a glob come in natural order (`a_2` before `a_10`), without hidden
    files, manifests and, where some have a known suffix, files without. A dataset saved by Hugging Face `datasets`
    lists its files. Of a folder of clip-retrieval, `side` tells which of its folders is meant.

    Raises
    ------
    FileNotFoundError
        If a path is missing, a directory is empty, or a glob matches nothing.
    ImportError
        If what reads a URL is not installed.
    OSError
        If a store refuses, or still fails after some tries.
    ValueError
        If a directory holds only files of unknown suffix, several splits, or both sides and none is asked for.
    """
    if isinstance(data, list | tuple):
        return [path for item in data for path in file_paths(item, side)]
    text = os.fspath(data)
    if not isinstance(text, str):
        raise TypeError(f"a path must be text, got {text!r}")
    if is_url(text) and not text.startswith("file://"):
        remote = list_files(text)
        return [*remote] if [str(path) for path in remote] == [text] else _shards_among(remote, text)
    path = Path(text.removeprefix("file://"))
    if path.is_dir():
        path = side_of(path, side)
        listed = listed_files(path)
        return _shards_among(_files_among(path.iterdir()), path) if listed is None else [*listed]
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        return _shards_among(_files_among(map(Path, glob.iglob(str(path), recursive=True))), path)
    raise FileNotFoundError(f"{text} does not exist")


def local_files(paths: Any) -> list[Path]:
    """Return the local files, of any suffix, that a path, a glob or a list of such stands for, globs in natural order.

    FileNotFoundError if a path is missing or a glob matches nothing.
    """
    if isinstance(paths, list | tuple):
        return [path for item in paths for path in local_files(item)]
    path = Path(paths)
    found = [path] if path.exists() else _files_among(map(Path, glob.iglob(str(path), recursive=True)))
    if not found:
        raise FileNotFoundError(f"{path} does not exist or matches no files")
    return sorted(found, key=natural_order)


def _files_among(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_file()]


def _shards_among(candidates: Sequence[AnyPath], where: object) -> list[AnyPath]:
    files = [path for path in candidates if not path.name.startswith(".") and path.name != MANIFEST]
    if not files:
        raise FileNotFoundError(f"{where} holds or matches no files")
    stems = {(str(path.parent), path.stem) for path in files}
    known = [path for path in files if format_of(path) and not _is_sidecar(path, stems)]
    if not known:
        if is_compressed_tar(files[0]):
            raise ValueError(unknown(files[0]))
        raise ValueError(
            f"{where} holds no file of a known suffix ({', '.join(FORMATS)}), for instance {files[0].name}"
        )
    return sorted(known, key=natural_order)


def _is_sidecar(path: AnyPath, stems: set[tuple[str, str]]) -> bool:
    return path.stem.endswith(SIDECAR) and (str(path.parent), path.stem.removesuffix(SIDECAR)) in stems


def natural_order(path: AnyPath) -> tuple[list[tuple[int, int | str]], str]:
    """Return a key by which `a_2` comes before `a_10`."""
    parts = re.split(r"([0-9]+)", str(path))
    return [(0, int(part)) if i % 2 else (1, part) for i, part in enumerate(parts)], str(path)
