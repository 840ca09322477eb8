"""The ids of a file in their order, as hashes: what was written can be compared with what was read.

Of each id its length in bytes counts, -1 for a missing one, and its bytes: UTF-8, or eight of an integer. So the hashes
are the same in every format and however the rows are cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._native import _C
from ._arrow import ArrowShard, ParquetShard, read_column
from ._pickles import LoadedPickle, load_pickle
from .formats import Shard, format_of

PICKLE_ID = "id"
# From one hash to the next: so much is known of where ids differ.
_BLOCK_ROWS = 1 << 16


class IdOrder:
    """Hashes ids as they come.

    Attributes
    ----------
    num_rows : int
        How many have come.
    """

    def __init__(self) -> None:
        self._lengths, self._bytes = _C.XXH64(), _C.XXH64()
        self._hashes: list[str] = []
        self._known = True
        self.num_rows = 0

    def update(self, ids: Any) -> None:
        """Add ids, an Arrow array or a list."""
        while len(ids) and self._known:
            part = ids[: _BLOCK_ROWS - self.num_rows % _BLOCK_ROWS]
            ids = ids[len(part) :]
            found = _of_list(part) if isinstance(part, list) else _of_array(part)
            if found is None:
                self._known = False
                return
            self._lengths.update(found[0])
            self._bytes.update(found[1])
            self.num_rows += len(part)
            if self.num_rows % _BLOCK_ROWS == 0:
                self._hashes.append(self._hash())

    def hashes(self) -> list[str] | None:
        """Return the hash of all ids up to the end of each block; None where some are neither text nor integers."""
        if not self._known:
            return None
        return self._hashes + ([self._hash()] if self.num_rows % _BLOCK_ROWS else [])

    def _hash(self) -> str:
        both = _C.XXH64()
        both.update((self._lengths.hexdigest() + self._bytes.hexdigest()).encode())
        return str(both.hexdigest())


def _of_array(array: Any) -> tuple[NDArray[np.int64], Any] | None:
    """Return the lengths `(n,)` and the bytes of the ids in an Arrow array."""
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    lengths = np.full(len(array), 8, np.int64)
    if pa.types.is_null(kind):
        return np.full(len(array), -1, np.int64), b""
    if pa.types.is_integer(kind):
        values = array.drop_null() if array.null_count else array
        values = values.view(pa.int64()) if pa.types.is_uint64(kind) else values.cast(pa.int64())
        data: Any = np.ascontiguousarray(values.to_numpy())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        lengths = compute.fill_null(compute.binary_length(array), -1).to_numpy().astype(np.int64)
        text = (array.drop_null() if array.null_count else array).cast(pa.large_string())
        offsets = np.frombuffer(text.buffers()[1], np.int64)[text.offset :][: len(text) + 1]
        held = text.buffers()[2]
        data = b"" if held is None or not len(text) else memoryview(held)[offsets[0] : offsets[-1]]
    else:
        return None
    if array.null_count:
        lengths[array.is_null().to_numpy(zero_copy_only=False)] = -1
    return lengths, data


def _of_list(ids: list[Any]) -> tuple[NDArray[np.int64], Any] | None:
    """Return the lengths `(n,)` and the bytes of ids, as `_of_array` does."""
    if all(type(each) is int for each in ids):
        with suppress(OverflowError):  # unsigned ones are encoded as the rest
            return np.full(len(ids), 8, np.int64), np.array(ids, np.int64)
    try:
        encoded = [each.encode() if isinstance(each, str) else _bytes_of(each) for each in ids]
    except (TypeError, OverflowError, UnicodeEncodeError):
        return None
    lengths = np.array([-1 if each is None else len(each) for each in encoded], np.int64)
    return lengths, b"".join(each for each in encoded if each is not None)


def _bytes_of(value: object) -> bytes | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError("neither text nor an integer")
    return int(value).to_bytes(8, "little", signed=bool(value < 0))


def id_name(shard: Shard, id_column: str) -> str | None:
    """Return under which name a file has ids, None where it has none."""
    if isinstance(shard, LoadedPickle):
        return PICKLE_ID if any(PICKLE_ID in item for item in shard.dicts) else None
    if not isinstance(shard, ParquetShard | ArrowShard) or id_column == shard.column:
        return None
    return id_column if shard.schema.names.count(id_column) == 1 else None


def ids_of(columns: Any, name: str) -> Any:
    """Return the ids of a chunk, an Arrow array or a list, from its `columns`."""
    return [item.get(name) for item in columns] if isinstance(columns, list) else columns.column(name)


def read_ids(path: Path, name: str) -> Iterator[Any]:
    """Yield the ids of a table or a pickle, parts of a block at most.

    Raises
    ------
    OSError, ValueError
        If the file cannot be read or has no such column.
    """
    if format_of(path) == "pickle":
        dicts = load_pickle(path)
        for start in range(0, len(dicts), _BLOCK_ROWS):
            yield ids_of(dicts[start : start + _BLOCK_ROWS], name)
        return
    for column in read_column(path, name):
        for start in range(0, len(column), _BLOCK_ROWS):
            yield column[start : start + _BLOCK_ROWS]


def id_problem(path: Path, name: str, expected: list[str], num_rows: int) -> str | None:
    """Return in one line where the ids of a file are not those that gave these hashes, None if they are."""
    found = IdOrder()
    for ids in read_ids(path, name):
        found.update(ids)
    hashes = found.hashes()
    if hashes == expected:
        return None
    if found.num_rows != num_rows:
        return f"{path.name} has {found.num_rows} ids, the manifest states {num_rows} rows"
    block = next((i for i, (one, other) in enumerate(zip(hashes or [], expected, strict=False)) if one != other), 0)
    start = block * _BLOCK_ROWS
    end = min(num_rows, start + _BLOCK_ROWS)
    where = f"{path.name}: the ids are not those of the input in their order, first in rows {start} to {end - 1}"
    return where + _reason(path, name, start, end)


def _reason(path: Path, name: str, start: int, end: int) -> str:
    """Return what is wrong in these rows, where they tell it alone: an id that is missing, or there before."""
    rows: dict[Any, int] = {}
    row = 0
    for ids in read_ids(path, name):
        for value in ids if isinstance(ids, list) else ids.to_pylist():
            if row >= end:
                return ""
            if row >= start:
                if value is None:
                    return f": row {row} has none"
                if value in rows:
                    return f": row {row} has {value!r}, as row {rows[value]} has"
                rows[value] = row
            row += 1
    return ""
