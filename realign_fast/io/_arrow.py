"""Parquet and Arrow IPC files, through pyarrow; rows are lists, large lists or fixed-size lists of floats."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._dtypes import Rows, storage
from ._raw import Blocks, Chunk, Layout, check_shape, read_layout
from ._remote import AnyPath, RemotePath

DEFAULT_COLUMN = "embedding"
_DTYPES = {"halffloat": "float16", "float": "float32", "double": "float64"}
_BUFFER_BYTES = 1 << 20
_COLUMN_ROWS = 1 << 16


def import_pyarrow(path: AnyPath) -> Any:
    """Return pyarrow; ImportError in one line where it is missing."""
    try:
        import pyarrow
    except ImportError:
        raise ImportError(f"{path}: reading it needs pyarrow: pip install 'realign-fast[files]'") from None
    return pyarrow


class ParquetShard:
    """One `.parquet` file, decoded a batch at a time however large its row groups are."""

    decoded = True

    def __init__(self, path: AnyPath, column: str | None) -> None:
        self.path = path
        self._pa = import_pyarrow(path)
        with self._open() as file:
            self.schema = file.schema_arrow
            self.num_rows = file.metadata.num_rows
            self.column = column or DEFAULT_COLUMN
            self.dtype, self.dim = _embedding_type(self._pa, path, self.schema, self.column)
            self.ranges: list[tuple[int, int]] = []
            if isinstance(path, RemotePath):
                self.ranges = _column_ranges(file.metadata, self.column, path.size)
            if self.dim == 0 and self.num_rows:
                first = next(file.iter_batches(1, columns=[self.column], use_threads=False), None)
                if first is None:
                    raise ValueError(f"{path}: expected {self.num_rows} rows by its footer, found 0")
                self.dim = _first_length(path, first.column(0))
        check_shape(path, self.num_rows, self.dim or 1)

    def chunks(self, blocks: Blocks, *, columns: bool = False) -> Generator[Chunk, None, None]:
        """Read the rows, with the other columns in a RecordBatch if `columns`."""
        if self.num_rows == 0:
            return
        step = blocks.num_rows(self.dim * storage(self.dtype).itemsize)
        start = 0
        with self._open(blocks) as file:
            names = None if columns else [self.column]
            for batch in file.iter_batches(step, columns=names, use_threads=False):
                values = _values(self.path, batch.column(self.column), self.dim, start)
                yield Chunk(Rows(values, self.dtype), start, _others(batch, self.column) if columns else None)
                start += len(values)
        if start != self.num_rows:
            raise ValueError(f"{self.path}: expected {self.num_rows} rows by its footer, found {start}")

    @contextmanager
    def _open(self, blocks: Blocks | None = None) -> Iterator[Any]:
        from pyarrow import parquet

        # A buffered stream without pre-buffering reads pages, not whole column chunks.
        options = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
        with arrow_errors(self._pa, self.path), ExitStack() as stack:
            source: Any = self.path
            if isinstance(self.path, RemotePath):
                remote = stack.enter_context(blocks.open(self.path) if blocks else self.path.open())
                source = self._pa.PythonFile(remote, "r")
            yield stack.enter_context(parquet.ParquetFile(source, **options))


def _column_ranges(metadata: Any, column: str, size: int) -> list[tuple[int, int]]:
    """Return which bytes of a parquet file hold a column, in the order in which they are read."""
    found = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if f"{chunk.path_in_schema}.".startswith(f"{column}."):
                begin = chunk.dictionary_page_offset or chunk.data_page_offset
                end = begin + chunk.total_compressed_size
                if 0 <= begin < end <= size:  # else the footer is damaged, and reading will tell
                    found.append((begin, end))
    return found


class ArrowShard:
    """One Arrow IPC file (`.arrow`), in the file or the stream format.

    It is mapped, since only so does pyarrow tell where the values of a record batch lie, and a batch may be as large as
    the file. Uncompressed values are then read from the file like any raw rows, a window at a time. Of a compressed
    file the column of the embeddings alone is asked for; of any other all columns, which costs nothing, where of some
    alone pyarrow makes copies.
    """

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        self._pa = import_pyarrow(path)
        with path.open("rb") as file:
            self.is_stream = file.read(6) != b"ARROW1"
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty, expected an Arrow IPC file or stream")
        self.column = column or DEFAULT_COLUMN
        with self._open() as (schema, mapped, batches):
            self.schema = schema
            self.dtype, self.dim = _embedding_type(self._pa, path, schema, self.column)
            self._fields: list[int] | None = None
            first = next((batch.column(self.column) for batch in batches(None) if batch.num_rows), None)
            if first is not None:
                self.dim = self.dim or _first_length(path, first)
                if _offset(_values(path, first, self.dim, 0), mapped) is None:
                    self._fields = [schema.get_field_index(self.column)]
            self.decoded = self._fields is not None
            self.num_rows = sum(batch.num_rows for batch in batches(self._fields))
        check_shape(path, self.num_rows, self.dim or 1)

    def chunks(self, blocks: Blocks, *, columns: bool = False) -> Generator[Chunk, None, None]:
        """Read the rows, with the other columns in a RecordBatch if `columns`."""
        start = 0
        with self._open() as (_, mapped, batches):
            for batch in batches(None if columns else self._fields):
                others = _others(batch, self.column) if columns else None
                values = _values(self.path, batch.column(self.column), self.dim, start)
                for chunk in self._batch_chunks(values, mapped, blocks):
                    part = None if others is None else others.slice(chunk.start, len(chunk.rows.values))
                    yield Chunk(chunk.rows, start + chunk.start, part, chunk.check)
                start += len(values)

    def layouts(self) -> list[Layout]:
        """Return where the rows of each record batch lie in the file; none at all where a batch is compressed."""
        found = []
        with self._open() as (_, mapped, batches):
            start = 0
            for batch in batches(None):
                if not batch.num_rows:
                    continue
                values = _values(self.path, batch.column(self.column), self.dim, start)
                offset = _offset(values, mapped)
                if offset is None:
                    return []
                found.append(Layout(offset, len(values), self.dim, self.dtype))
                start += len(values)
        return found

    def _batch_chunks(self, values: NDArray[Any], mapped: Any, blocks: Blocks) -> Generator[Chunk, None, None]:
        offset = _offset(values, mapped)
        if offset is not None:
            yield from read_layout(self.path, Layout(offset, len(values), self.dim, self.dtype), blocks)
        else:  # decompressed: they lie in memory already
            step = blocks.num_rows(values.itemsize * self.dim)
            for start in range(0, len(values), step):
                yield Chunk(Rows(values[start : start + step], self.dtype), start)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        from pyarrow import ipc

        with arrow_errors(self._pa, self.path), self._pa.memory_map(os.fspath(self.path)) as file:

            def batches(fields: list[int] | None) -> Iterator[Any]:
                options = ipc.IpcReadOptions(included_fields=fields, use_threads=False)
                file.seek(0)
                if self.is_stream:
                    yield from ipc.open_stream(file, options=options)
                else:
                    reader = ipc.open_file(file, options=options)
                    for index in range(reader.num_record_batches):
                        yield reader.get_batch(index)

            begin = file.read_buffer(1).address
            file.seek(0)
            schema = ipc.open_stream(file).schema if self.is_stream else ipc.open_file(file).schema
            yield schema, (begin, file.size()), batches


def _offset(values: NDArray[Any], mapped: tuple[int, int]) -> int | None:
    """Return where values lie in a map, its address and length given; None where they are elsewhere, decompressed."""
    address, length = mapped
    offset = values.ctypes.data - address
    return offset if 0 <= offset <= length - values.nbytes else None


def read_column(path: AnyPath, name: str) -> Iterator[Any]:
    """Yield a column of a parquet or Arrow IPC file, a checked array for each batch of rows.

    Raises
    ------
    OSError, ValueError
        If the file cannot be read, or has no such column.
    """
    pa = import_pyarrow(path)
    with ExitStack() as stack:
        stack.enter_context(arrow_errors(pa, path))
        file = stack.enter_context(path.open() if isinstance(path, RemotePath) else pa.memory_map(os.fspath(path)))
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            table = stack.enter_context(parquet.ParquetFile(file))
            names = table.schema_arrow.names
            batches = table.iter_batches(_COLUMN_ROWS, columns=[name] if name in names else [], use_threads=False)
        else:
            is_stream = file.read(6) != b"ARROW1"
            file.seek(0)
            reader = (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(file)
            names = reader.schema.names
            batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        if name not in names:
            raise ValueError(f"{path}: no column {name!r} of ids; it has {names}")
        for batch in batches:
            column = batch.column(name)
            column.validate(full=True)
            yield column


@contextmanager
def arrow_errors(pa: Any, path: AnyPath) -> Iterator[None]:
    """Raise pyarrow's errors as ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is damaged or in an unknown format: {first_line}") from error


def _embedding_type(pa: Any, path: AnyPath, schema: Any, column: str) -> tuple[str, int]:
    """Return the dtype of the embeddings, and their dimension where the type states it, else 0."""
    count = schema.names.count(column)
    if count != 1:
        raise ValueError(f"{path}: {'no' if count == 0 else count} columns {column!r}; it has {schema.names}")
    found = schema.field(column).type
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
    if not is_list or str(found.value_type) not in _DTYPES:
        hint = ": dequantise it first" if is_list and pa.types.is_integer(found.value_type) else ""
        raise ValueError(f"{path}: column {column!r} must hold lists of float16, float32 or float64, got {found}{hint}")
    dim = 0
    if pa.types.is_fixed_size_list(found):
        dim = found.list_size
        check_shape(path, 0, dim)
    return _DTYPES[str(found.value_type)], dim


def _others(batch: Any, column: str) -> Any:
    """Return the columns beside the embeddings, None where there are none."""
    others = batch.select([i for i, name in enumerate(batch.schema.names) if name != column])
    others.validate(full=True)
    return others if others.num_columns else None


def _first_length(path: AnyPath, array: Any) -> int:
    array.validate(full=True)
    if array.is_null()[0].as_py():
        raise ValueError(f"{path}: row 0 is null, expected a list of numbers")
    length = len(array[0])
    check_shape(path, 1, length)
    return length


def _values(path: object, array: Any, dim: int, start: int) -> NDArray[Any]:
    """Return the lists of `array`, the first of which is row `start`, as `(n, dim)` without copying."""
    array.validate(full=True)
    if array.null_count:
        row = start + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{path}: row {row} is null, expected {dim} numbers")
    if hasattr(array, "offsets"):
        offsets = array.offsets.to_numpy()
        lengths = np.diff(offsets)
        ragged = np.flatnonzero(lengths != dim)
        if ragged.size:
            raise ValueError(
                f"{path}: row {start + int(ragged[0])} has {lengths[ragged[0]]} elements, expected {dim} as in row 0"
            )
        flat = array.values.slice(offsets[0], len(array) * dim)
    else:
        flat = array.flatten()
    if flat.null_count:
        place = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{path}: row {start + place // dim} holds a null, expected {dim} numbers")
    values: NDArray[Any] = flat.to_numpy(zero_copy_only=True)
    return values.reshape(len(array), dim)


def embeddings_of(where: str, array: Any, start: int) -> NDArray[Any]:
    """Return the embeddings `(n, ..., dim)` of an array of lists, or of tensors, of numbers; nothing is copied.

    `where` and the row `start`, the first, are for errors. ValueError where rows are missing or of different lengths.
    """
    if hasattr(array.type, "shape"):  # tensors: those of pyarrow, or of Ray
        if array.null_count:
            row = start + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
            raise ValueError(f"{where}: row {row} is null, expected an embedding")
        order = getattr(array.type, "permutation", None)
        if order is not None and list(order) != sorted(order):
            raise ValueError(f"{where} holds tensors with permuted axes ({array.type}): store them in order")
        values: NDArray[Any] = array.to_numpy_ndarray() if hasattr(array, "to_numpy_ndarray") else array.to_numpy()
        return values
    if not hasattr(array.type, "value_type"):
        raise ValueError(f"{where} must hold lists or tensors of numbers, got {array.type}")
    return _values(where, array, len(array[0]) if array[0].is_valid else 0, start)


def like(array: Any, values: NDArray[Any]) -> Any:
    """Return an array of the type of `array`, which `embeddings_of` takes, that holds `values` `(n, ..., dim)`."""
    import pyarrow

    flat = values.reshape(len(values), -1)
    if hasattr(array, "storage"):
        return pyarrow.ExtensionArray.from_storage(array.type, list_array(pyarrow, flat, array.storage.type))
    return list_array(pyarrow, flat, array.type)


def list_array(pa: Any, values: NDArray[Any], kind: Any) -> Any:
    """Return rows `(n, dim)` as an array of type `kind`: lists, large lists or lists of a fixed size."""
    flat = pa.array(values.reshape(-1))
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    large = pa.types.is_large_list(kind)
    offsets = pa.array(np.arange(len(values) + 1, dtype=np.int64 if large else np.int32) * values.shape[1])
    if large:
        return pa.LargeListArray.from_arrays(offsets, flat, type=kind)
    return pa.ListArray.from_arrays(offsets.cast(pa.int32()), flat, type=kind)
