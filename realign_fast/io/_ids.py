"""Ids of rows in one file that is mapped: which row has an id, and which id a row has (see FORMATS.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _files
from .._native import _C
from ._layouts import metadata_of
from ._random import RandomRows
from ._remote import AnyPath, state_of
from ._safetensors import parse
from ._tar import TAR_ID, TarShard
from .formats import format_of
from .sources import SIDECAR

_KIND = "ids"
_DTYPES: dict[str, tuple[str, Any]] = {
    "offsets": ("I64", np.int64),
    "hashes": ("U64", np.uint64),
    "rows": ("I64", np.int64),
    "text": ("U8", np.uint8),
}


class Ids:
    """An index of ids, mapped: as good as nothing of it is in memory before it is used.

    Parameters
    ----------
    path
        Of the index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        tensors, metadata, start = parse(path)
        try:
            fields = _files.header_of(path, metadata)
            if fields.get("kind") != _KIND:
                raise ValueError(f"it holds {fields.get('kind')!r}")
            self.integers, self.made_from = bool(fields["integers"]), fields["made_from"]
            found = {name: tensors[name] for name in _DTYPES}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no index of ids: {error}; remove it, and it is made anew") from None
        memory: Any = np.memmap(path, np.uint8, "r")
        arrays: dict[str, NDArray[Any]] = {}
        for name, (code, dtype) in _DTYPES.items():
            tensor = found[name]
            if tensor.code != code or len(tensor.shape) != 1:
                raise ValueError(f"{path}: {name} must be {code} with one axis, got {tensor.code} {tensor.shape}")
            arrays[name] = np.asarray(memory[start + tensor.begin : start + tensor.end]).view(dtype)
        self._offsets, self._hashes, self._rows = arrays["offsets"], arrays["hashes"], arrays["rows"]
        self._text = memoryview(memory)[start + found["text"].begin : start + found["text"].end]
        if not len(self._offsets) - 1 == len(self._hashes) == len(self._rows):
            raise ValueError(f"{path}: offsets, hashes and rows must be of as many ids")

    def __len__(self) -> int:
        return len(self._rows)

    def __reduce__(self) -> tuple[type[Ids], tuple[Path]]:
        return Ids, (self.path,)

    def locate(self, ids: Sequence[Any]) -> NDArray[np.int64]:
        """Return the rows of these ids, -1 where there is none; among integers, text is looked up by its value."""
        return self._locate(ids)[0]

    def find(self, ids: Sequence[Any]) -> NDArray[np.int64]:
        """Return the rows of these ids.

        Raises
        ------
        KeyError
            If there is no such id.
        """
        found, missing = self._locate(ids)
        if missing >= 0:
            raise KeyError(f"no id {ids[missing]!r} among the {len(self)} of {self.path}")
        return found

    def _locate(self, ids: Sequence[Any]) -> tuple[NDArray[np.int64], int]:
        found = np.empty(len(ids), np.int64)
        wanted = [_integer_text(each) for each in ids] if self.integers else ids
        return found, _C.find_ids(wanted, self._hashes, self._rows, self._offsets, self._text, found)

    def of(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """Return the ids `(n,)` of the rows with these numbers: int64, or text as objects."""
        begins, ends = self._offsets[numbers].tolist(), self._offsets[numbers + 1].tolist()
        text = self._text
        found = [bytes(text[begin:end]).decode() for begin, end in zip(begins, ends, strict=True)]
        return np.array([int(each) for each in found], np.int64) if self.integers else np.array(found, object)


def _integer_text(value: Any) -> str:
    try:
        return str(int(value))
    except ValueError:
        return ""  # which no integer is written as


def open_ids(path: Path, rows: RandomRows, id_column: str, id_paths: list[AnyPath] | None) -> Ids:
    """Return the index at `path`, made where it is absent or of other files.

    Parameters
    ----------
    rows
        Whose ids they are.
    id_column
        Its name.
    id_paths
        Parquet or arrow files that hold the ids of all rows in order; None: the arrow files and tars of the rows, for
        each other file its sidecar or, where it lies as clip-retrieval writes it, the metadata of its number.

    Raises
    ------
    OSError, ValueError
        If a file cannot be read, ids are missing, null, neither text nor integers, or occur twice.
    """
    sources: list[AnyPath] = [_id_file(each) for each in rows.paths] if id_paths is None else id_paths
    stats = [[each.name, *state_of(each)] for each in sources]
    made_from = json.loads(json.dumps([id_column, rows.num_rows, rows.stamp, stats]))
    if path.exists():
        ids = Ids(path)
        if ids.made_from == made_from:
            return ids
    _write(path, sources, rows, id_column, made_from, of_each_file=id_paths is None)
    return Ids(path)


def _id_file(path: AnyPath) -> Path:
    """Return the file that holds the ids of a file's rows."""
    if isinstance(path, Path):
        if format_of(path) in ("arrow", "tar"):
            return path
        for suffix in (".parquet", ".arrow"):
            sidecar = path.with_name(path.stem + SIDECAR + suffix)
            if sidecar.exists():
                return sidecar
        if (metadata := metadata_of(path)) is not None:
            return metadata
    raise ValueError(f"{path} has no ids: pass ids=, parquet or arrow files that hold them, in the order of the rows")


def _write(
    path: Path, sources: list[AnyPath], rows: RandomRows, id_column: str, made_from: Any, *, of_each_file: bool
) -> None:
    offsets, text, integers, counts = _read_ids(sources, id_column, rows.column)
    if of_each_file:
        for file, source, expected, count in zip(rows.paths, sources, rows.rows_of_files(), counts, strict=True):
            if count != expected:
                raise ValueError(f"{source} holds {count} ids, {file} has {expected} rows")
    if len(offsets) - 1 != rows.num_rows:
        raise ValueError(f"expected ids of {rows.num_rows} rows, {sources[0]} ... hold {len(offsets) - 1}")
    hashes = np.empty(len(offsets) - 1, np.uint64)
    _C.hash_ids(offsets, text, hashes)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    _refuse_repeats(hashes, order, offsets, text, rows)
    tensors: dict[str, NDArray[Any]] = {
        "offsets": offsets,
        "hashes": hashes,
        "rows": order.astype(np.int64),
        "text": text,
    }
    # Of any size: it is mapped, not read.
    _files.save(path, _KIND, tensors, {"integers": integers, "made_from": made_from}, max_bytes=None)


def _refuse_repeats(
    hashes: NDArray[np.uint64],
    order: NDArray[np.intp],
    offsets: NDArray[np.int64],
    text: NDArray[np.uint8],
    rows: RandomRows,
) -> None:
    def id_at(row: int) -> bytes:
        return text[offsets[row] : offsets[row + 1]].tobytes()

    # Ids of one hash lie side by side; different ones among them are rarer than anything else that can go wrong.
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
        first, second = int(order[place]), int(order[place + 1])
        if id_at(first) == id_at(second):
            raise ValueError(
                f"id {id_at(first).decode(errors='replace')!r} occurs twice: {rows.place(first)} and "
                f"{rows.place(second)}"
            )


def _read_ids(
    sources: list[AnyPath], id_column: str, column: str | None
) -> tuple[NDArray[np.int64], NDArray[np.uint8], bool, list[int]]:
    """Return offsets `(n + 1,)`, the text, whether the ids are integers, and how many each file has."""
    lengths, texts, kinds = [], [], set()
    for path in sources:
        ids, is_integer = _id_column(path, id_column, column)
        if not len(ids):
            lengths.append(np.zeros(0, np.int64))
            continue
        kinds.add(is_integer)
        offsets = np.frombuffer(ids.buffers()[1], np.int64)[ids.offset :][: len(ids) + 1]
        lengths.append(np.diff(offsets))
        if ids.buffers()[2] is not None:
            texts.append(np.frombuffer(ids.buffers()[2], np.uint8)[offsets[0] : offsets[-1]])
    if len(kinds) > 1:
        raise ValueError(f"{id_column!r} is text in some files and integers in others")
    counts = np.concatenate(lengths)
    text = np.concatenate(texts) if texts else np.zeros(0, np.uint8)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return offsets, text, kinds == {True}, [len(each) for each in lengths]


def _id_column(path: AnyPath, name: str, embedding_column: str | None) -> tuple[Any, bool]:
    """Return the ids of a file as one large_string array, and whether they were integers."""
    from ._arrow import arrow_errors, import_pyarrow, read_column

    pa = import_pyarrow(path)
    if isinstance(path, Path) and format_of(path) == "tar":
        if name != TAR_ID:
            raise ValueError(f"{path}: the ids of a tar are its keys: leave id_column at {TAR_ID!r}, got {name!r}")
        return pa.array(list(TarShard(path, embedding_column).keys()), pa.large_string()), False
    columns = list(read_column(path, name))
    if not sum(map(len, columns)):  # without rows there may be no type either
        return pa.array([], pa.large_string()), False
    with arrow_errors(pa, path):
        column = pa.chunked_array(columns)
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise ValueError(f"{path}: the id of row {row} is missing")
        is_integer = pa.types.is_integer(column.type)
        if not (is_integer or pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise ValueError(f"{path}: ids must be text or integers, column {name!r} holds {column.type}")
        return column.cast(pa.large_string()).combine_chunks(), is_integer
