"""WebDataset tars: a sample is a run of members with one key, and one of its members is the embedding, as npy.

The key is a member's path up to the first dot of its base name, its extension what follows that dot, in lower case.
Folders, hidden files and names without a dot belong to no sample.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._dtypes import Rows, storage
from .._native import _C
from .._os import pread
from . import _npy
from ._raw import Blocks, Chunk, check_shape
from ._tar_headers import BLOCK_BYTES, Member, Window, padded, read_windows, shown

TAR_ID = "id"
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset leaves such names out as well
_MAX_MEMBERS = 1000  # of a sample, and extensions of a file
_MAX_COLUMN_BYTES = 1 << 30  # of a member that becomes a value of a table
_COLUMNS_AT_ONCE_BYTES = 32 << 20
_TEXTS = frozenset(("txt", "text", "json", "cls"))
_HASHED_AT_ONCE = 4096


class Sample(NamedTuple):
    """Members of one key by extension.

    The header of the embedding's member lies at byte `header`, its values at `values`; it has `axes` axes.
    """

    key: str
    members: dict[str, Member]
    header: int
    values: int
    axes: int
    swapped: bool


class TarShard:
    """One `.tar` file; the embedding of a sample is the member with the extension `column`, or its only `.npy`.

    An embedding is an array of shape `(dim,)` or `(1, dim)`. Opening it reads the first sample alone.
    """

    num_rows = None
    decoded = True

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        self._only = column is None
        self.column, self.dim, self.dtype = (column or "npy").lower(), 0, ""
        self.stray: str | None = None
        with path.open("rb", buffering=0) as file:
            for key, members, _ in self._grouped(file.fileno()):
                self.column = self._choose(key, members)
                found = self._parse(file.fileno(), members[self.column])
                self.dim, self.dtype = found.shape[-1], found.dtype
                break

    def load(self) -> LoadedTar:
        """Find all embeddings."""
        return LoadedTar(self)

    def chunks(self, blocks: Blocks, *, columns: bool = False) -> Generator[Chunk, None, None]:
        """Read the rows; other columns are given by what `load` returns."""
        if self.dim == 0:
            return
        with self.path.open("rb", buffering=0) as file:
            samples, start = self.samples(file.fileno()), 0
            step = blocks.num_rows(self.dim * storage(self.dtype).itemsize)
            while True:
                values, swapped = array("q"), array("b")
                for sample in islice(samples, step):
                    values.append(sample.values)
                    swapped.append(sample.swapped)
                if not values:
                    return
                places = np.frombuffer(values, np.int64)
                yield Chunk(self.read(file.fileno(), places, np.frombuffer(swapped, np.bool_), blocks), start)
                start += len(values)

    def keys(self) -> Iterator[str]:
        """Yield the key of each sample."""
        with self.path.open("rb", buffering=0) as file:
            for sample in self.samples(file.fileno()):
                yield sample.key

    def read(self, fd: int, places: NDArray[np.int64], swapped: NDArray[np.bool_], blocks: Blocks) -> Rows:
        """Read the rows at these places `(n,)` of the file."""
        dtype = storage(self.dtype)
        values = blocks.take(len(places), self.dim, dtype)
        fds = np.full(len(places), fd, np.int32)
        if _C.read_rows(fds, places, values, self.dim * dtype.itemsize, blocks.num_threads) < len(places):
            raise ValueError(f"{self.path} was truncated while it was read")
        if swapped.any():
            values[swapped] = values[swapped].byteswap()
        return Rows(values, self.dtype)

    def samples(self, fd: int) -> Generator[Sample, None, None]:
        """Yield all samples in order.

        Raises
        ------
        ValueError
            If a sample has no embedding, several where none was chosen, or one that differs from the first; if an
            extension occurs twice in it, or the tar is damaged.
        """
        column, only = self.column, self._only
        begin, size, known = b"", -1, _npy.Array((0,), "", False, False, 0)
        for key, members, window in self._grouped(fd):
            member = members.get(column)
            if member is None or (only and len(members) > 1 and len(_npys_of(members)) > 1):
                member = members[self._choose(key, members)]
            place = member.data - window.start
            # As good as always it has the very header of the one before.
            if member.size != size or window.data[place : place + len(begin)] != begin:
                known = self._parse(fd, member)
                if (known.shape[-1], known.dtype) != (self.dim, self.dtype):
                    raise ValueError(
                        f"{self.path}: sample {shown(key)} has dimension {known.shape[-1]} and dtype {known.dtype}, "
                        f"expected {self.dim} and {self.dtype} as in the first"
                    )
                begin, size = pread(fd, known.offset, member.data), member.size
            yield Sample(key, members, member.header, member.data + known.offset, len(known.shape), known.swapped)

    def _grouped(self, fd: int) -> Generator[tuple[str, dict[str, Member], Window], None, None]:
        """Yield the key and the members of each sample, and the window in which its embedding's header lies.

        (Where the column is not chosen yet or its member missing, that of the last.)
        """
        key: str | None = None
        members: dict[str, Member] = {}
        column = self.column
        window = of_embedding = Window([], b"", 0)
        for window in read_windows(self.path, fd):
            for member in window.members:
                name = member.name
                stem, dot, extension = name[name.rfind("/") + 1 :].partition(".")
                if not dot or not stem or (name.startswith("__") and _META.match(name)):
                    self.stray = self.stray or name
                    continue
                this = name[: -len(extension) - 1]
                if this != key:
                    if key is not None:
                        yield key, members, of_embedding
                    key, members, of_embedding = this, {}, window
                extension = extension.lower()
                if extension in members:
                    raise ValueError(f"{self.path}: sample {shown(key)} has two members .{shown(extension)[1:-1]}")
                if len(members) == _MAX_MEMBERS:
                    raise ValueError(f"{self.path}: sample {shown(key)} has more than {_MAX_MEMBERS} members")
                members[extension] = member
                if extension == column:
                    of_embedding = window
        if key is not None:
            yield key, members, of_embedding

    def _choose(self, key: str, members: dict[str, Member]) -> str:
        """Return which of its members is the embedding."""
        found, wrong = _npys_of(members), ""
        if self._only and len(found) == 1 and self.dim == 0:
            return found[0]
        if self._only and len(found) > 1:
            wrong = "has several npy members: name the extension of the embeddings by `column`"
        elif self._only and not found:
            wrong = "has no npy member"
        elif self.column not in members:
            wrong = f"has no member .{self.column}"
        if wrong:
            names = ", ".join("." + shown(name)[1:-1] for name in islice(members, 20))
            raise ValueError(f"{self.path}: sample {shown(key)} {wrong}; its members are {names}")
        return self.column

    def _parse(self, fd: int, member: Member) -> _npy.Array:
        name = f"{self.path}: member {shown(member.name)}"
        if member.sized:
            raise ValueError(f"{name} states its size in a pax header, as no embedding needs to")
        found = _npy.parse(name, pread(fd, min(member.size, _npy.MAX_START_BYTES), member.data), member.size)
        shape = found.shape
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1):
            raise ValueError(f"{name}: expected an array of shape (dim,) or (1, dim), got {shape!r}")
        check_shape(self.path, 1, shape[-1])
        _npy.check_size(name, found, member.size)
        return found


class LoadedTar:
    """A tar of which is known where all embeddings lie, at 18 bytes a row.

    Attributes
    ----------
    headers, values, axes : arrays (num_rows,)
        Where the header of each embedding's member lies, where its values, and how many axes it has.
    extensions : list of str
        Of the other members, in the order in which they first come.
    stray : str or None
        The first member that belongs to no sample.
    """

    decoded = True

    def __init__(self, shard: TarShard) -> None:
        self._shard = shard
        self.path, self.column, self.dim, self.dtype = shard.path, shard.column, shard.dim, shard.dtype
        headers, values, axes, swapped = array("q"), array("q"), array("b"), array("b")
        extensions: dict[str, None] = {}
        hashes: list[NDArray[np.uint64]] = []
        with self.path.open("rb", buffering=0) as file:
            keys: list[str] = []
            for sample in shard.samples(file.fileno()):
                headers.append(sample.header)
                values.append(sample.values)
                axes.append(sample.axes)
                swapped.append(sample.swapped)
                keys.append(sample.key)
                if len(keys) == _HASHED_AT_ONCE:
                    hashes.append(_hashes_of(keys))
                    keys = []
                if not extensions.keys() >= sample.members.keys():
                    extensions.update(dict.fromkeys(sample.members))
                    if len(extensions) > _MAX_MEMBERS:
                        raise ValueError(f"{self.path} has members of more than {_MAX_MEMBERS} extensions")
            hashes.append(_hashes_of(keys))
        extensions.pop(self.column, None)
        self.extensions, self.stray = list(extensions), shard.stray
        self.headers, self.values = np.frombuffer(headers, np.int64), np.frombuffer(values, np.int64)
        self.axes, self.swapped = np.frombuffer(axes, np.int8), np.frombuffer(swapped, np.bool_)
        self.num_rows = len(values)
        self._refuse_repeats(np.concatenate(hashes))

    def _refuse_repeats(self, hashes: NDArray[np.uint64]) -> None:
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if not len(same):
            return
        wanted, seen = set(order[np.concatenate([same, same + 1])].tolist()), dict[str, int]()
        for row, key in enumerate(self._shard.keys()):
            if row in wanted and seen.setdefault(key, row) != row:
                raise ValueError(f"{self.path}: key {shown(key)} occurs twice: samples {seen[key]} and {row}")

    def chunks(self, blocks: Blocks, *, columns: bool = False) -> Generator[Chunk, None, None]:
        """Read the rows, with a RecordBatch of keys and other members if `columns`."""
        if self.num_rows == 0:
            return
        step = blocks.num_rows(self.dim * storage(self.dtype).itemsize)
        with self.path.open("rb", buffering=0) as file:
            fd, start = file.fileno(), 0
            samples = self._shard.samples(fd) if columns else None
            while start < self.num_rows:
                part = None if samples is None else self._part(samples, step)
                end = start + (min(step, self.num_rows - start) if part is None else len(part))
                if part == [] or end > self.num_rows:
                    raise ValueError(f"{self.path} has changed while it was read")
                rows = self._shard.read(fd, self.values[start:end], self.swapped[start:end], blocks)
                yield Chunk(rows, start, None if part is None else self._columns(fd, part))
                start = end

    def _part(self, samples: Iterator[Sample], num_rows: int) -> list[Sample]:
        """Return the next samples, fewer where their members are large."""
        part, num_bytes = [], 0
        for sample in islice(samples, num_rows):
            part.append(sample)
            num_bytes += sum(member.size + BLOCK_BYTES for member in sample.members.values())
            if num_bytes > _COLUMNS_AT_ONCE_BYTES:
                break
        return part

    def schema(self, id_name: str = TAR_ID) -> Any:
        """Return the types of the columns that the keys and the other members make."""
        from ._arrow import import_pyarrow

        pa = import_pyarrow(self.path)
        fields = [(name, pa.string() if _is_text(name) else pa.binary()) for name in self.extensions]
        return pa.schema([(id_name, pa.string()), *fields])

    def _columns(self, fd: int, part: list[Sample]) -> Any:
        from ._arrow import import_pyarrow

        pa, schema = import_pyarrow(self.path), self.schema()
        values = [[sample.key for sample in part]]
        values += [[self._value(fd, sample.members.get(name), name) for sample in part] for name in self.extensions]
        arrays = [pa.array(column, field.type) for column, field in zip(values, schema, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _value(self, fd: int, member: Member | None, extension: str) -> Any:
        if member is None:
            return None
        if member.size > _MAX_COLUMN_BYTES:
            raise ValueError(
                f"{self.path}: member {shown(member.name)} of {member.size} bytes is too large for a column, "
                f"expected at most {_MAX_COLUMN_BYTES}"
            )
        data = pread(fd, member.size, member.data)
        if len(data) < member.size:
            raise ValueError(f"{self.path} was truncated while it was read")
        try:
            return data.decode() if _is_text(extension) else data
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: member {shown(member.name)} is no UTF-8 text") from None

    def end_of(self, row: int) -> int:
        """Return where the member that follows a row's embedding begins."""
        data = int(self.headers[row]) + BLOCK_BYTES
        size = int(self.values[row]) - data + self.dim * storage(self.dtype).itemsize
        return data + padded(size)


def _npys_of(members: dict[str, Member]) -> list[str]:
    return [name for name in members if name == "npy" or name.endswith(".npy")]


def _is_text(extension: str) -> bool:
    return extension.rpartition(".")[2] in _TEXTS


def _hashes_of(keys: list[str]) -> NDArray[np.uint64]:
    encoded = [key.encode() for key in keys]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in encoded])]).astype(np.int64)
    hashes = np.empty(len(keys), np.uint64)
    _C.hash_ids(offsets, b"".join(encoded), hashes)
    return hashes
