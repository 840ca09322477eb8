"""Writers of each format. Each takes the chunks of one input file and puts them, with their new rows, into a sink.

What a target cannot hold goes into a sidecar in the input's own format: npy and safetensors have no columns, and
only safetensors has other tensors. The keys and other members of tars are columns.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .._dtypes import Rows, storage
from .._os import pread
from ._arrow import DEFAULT_COLUMN, ArrowShard, ParquetShard, arrow_errors, import_pyarrow, list_array
from ._id_order import PICKLE_ID
from ._pickles import LoadedPickle
from ._raw import Blocks, Chunk
from ._remote import AnyPath
from ._safetensors import DTYPE_CODES, METADATA, SafetensorsShard
from ._sink import Sink
from ._tar import TAR_ID, LoadedTar
from ._tar_headers import BLOCK_BYTES, padded, with_size
from .formats import Shard

_GROUP_BYTES = 32 << 20  # embeddings in a parquet row group, which is held in memory, and other columns beside them
_COPY_BYTES = 1 << 20
_PICKLE_COLUMN = "embed"


class Encoder(Protocol):
    """Writes one file.

    Attributes
    ----------
    column : str or None
        Under which the rows can be found again.
    """

    column: str | None

    def write(self, rows: Rows, chunk: Chunk) -> None:
        """Append `rows`, contiguous and only valid during the call, which take the place of those of `chunk`."""

    def close(self) -> None:
        """Write what is left, but do not finish the sink."""


class NpyEncoder:
    """`.npy`, version 1, C order, native bytes."""

    def __init__(self, sink: Sink, num_rows: int, dim: int, dtype: str) -> None:
        self._sink = sink
        self.column: str | None = None
        sink.write(_npy_header(dtype, (num_rows, dim)))

    def write(self, rows: Rows, chunk: Chunk) -> None:
        """Append the values."""
        self._sink.write(rows.values)

    def close(self) -> None:
        """Do nothing: the header stands at the front."""


class SafetensorsEncoder:
    """`.safetensors`: the rows in the place of the tensor they replace, other tensors and metadata as they were.

    Parameters
    ----------
    source
        The file whose other tensors are kept, or None.
    column
        The rows' tensor; None leaves them out, for a sidecar.
    """

    def __init__(
        self, sink: Sink, source: SafetensorsShard | None, column: str | None, num_rows: int, dim: int, dtype: str
    ) -> None:
        self._sink = sink
        self._source = source
        self.column = column
        # Name, dtype code, shape, offset in the source (None: the rows), size.
        entries: list[tuple[str, str, tuple[int, ...], int | None, int]] = []
        rows = list(entries)
        if column is not None:
            num_bytes = num_rows * dim * storage(dtype).itemsize
            rows = [(column, DTYPE_CODES[dtype], (num_rows, dim), None, num_bytes)]
        if source is None:
            entries += rows
        else:
            for name, tensor in sorted(source.tensors.items(), key=lambda item: item[1][2:]):
                offset, size = source.data_start + tensor.begin, tensor.end - tensor.begin
                entries += rows if name == source.column else [(name, tensor.code, tensor.shape, offset, size)]
        header: dict[str, Any] = {METADATA: source.metadata} if source and source.metadata else {}
        position = 0
        for name, code, shape, _, size in entries:
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        sink.write(len(text).to_bytes(8, "little") + text)
        self._copies = iter([(offset, size) for _, _, _, offset, size in entries])
        self._copy()

    def write(self, rows: Rows, chunk: Chunk) -> None:
        """Append the values."""
        if self.column is not None:
            self._sink.write(rows.values)

    def close(self) -> None:
        """Copy the tensors that follow the rows."""
        self._copy()

    def _copy(self) -> None:
        """Copy tensors up to where the rows belong, or to the end."""
        for offset, size in self._copies:
            if offset is None or self._source is None:
                return
            with self._source.path.open("rb") as file:
                file.seek(offset)
                while size:
                    data = file.read(min(_COPY_BYTES, size))
                    if not data:
                        raise ValueError(f"{self._source.path} was truncated while it was read")
                    self._sink.write(data)
                    size -= len(data)


class TarEncoder:
    """`.tar`: the source byte for byte but for the embeddings, which keep their place, header and shape."""

    def __init__(self, sink: Sink, source: LoadedTar, dtype: str) -> None:
        self._sink = sink
        self._source = source
        self.column: str | None = source.column
        self._starts = {axes: _npy_header(dtype, (1, source.dim)[2 - axes :]) for axes in (1, 2)}
        self._position = 0
        self._parts = bytearray()

    def write(self, rows: Rows, chunk: Chunk) -> None:
        """Append the embeddings, each after what lies before it in the source."""
        source = self._source
        with source.path.open("rb", buffering=0) as file:
            for row, values in enumerate(rows.values, chunk.start):
                header = int(source.headers[row])
                self._copy(file.fileno(), header)
                start = self._starts[int(source.axes[row])]
                size = len(start) + values.nbytes
                self._parts += with_size(_bytes_at(source.path, file.fileno(), header, BLOCK_BYTES), size)
                self._parts += start
                self._parts += values.tobytes()
                self._parts += bytes(padded(size) - size)
                self._position = source.end_of(row)
        self._flush()

    def close(self) -> None:
        """Copy what follows the last embedding."""
        with self._source.path.open("rb", buffering=0) as file:
            self._copy(file.fileno(), os.fstat(file.fileno()).st_size)
        self._flush()

    def _copy(self, fd: int, end: int) -> None:
        while self._position < end:
            self._parts += _bytes_at(self._source.path, fd, self._position, min(_COPY_BYTES, end - self._position))
            self._position += min(_COPY_BYTES, end - self._position)
            if len(self._parts) >= _COPY_BYTES:
                self._flush()

    def _flush(self) -> None:
        self._sink.write(self._parts)
        self._parts = bytearray()


def _bytes_at(path: Path, fd: int, offset: int, size: int) -> bytes:
    data = pread(fd, size, offset)
    if len(data) < size:
        raise ValueError(f"{path} was truncated while it was read")
    return data


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    fields = {"descr": storage(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


class PickleEncoder:
    """A pickled list of dicts. A pickle is one object, so all of it is held until `close`."""

    def __init__(self, sink: Sink, source: Shard, column: str | None, rename: dict[str, str]) -> None:
        self._sink = sink
        self._source = source
        self.column = column
        self._rename = rename
        self._dicts: list[dict[str, Any]] = []

    def write(self, rows: Rows, chunk: Chunk) -> None:
        """Append a dict for each row."""
        values = rows.values.copy()
        if isinstance(self._source, LoadedPickle):
            dicts = [self._replaced(item, value) for item, value in zip(chunk.columns, values, strict=True)]
        else:
            if chunk.columns is None:
                dicts = [{PICKLE_ID: chunk.start + i} for i in range(len(values))]
            else:
                names = [self._rename.get(name, name) for name in chunk.columns.schema.names]
                dicts = chunk.columns.rename_columns(names).to_pylist()
            for item, value in zip(dicts, values, strict=True):
                item[str(self.column)] = value
        self._dicts += dicts

    def _replaced(self, item: dict[str, Any], value: NDArray[Any]) -> dict[str, Any]:
        assert isinstance(self._source, LoadedPickle)
        old = item[self._source.column]
        if self.column is None:
            return {key: other for key, other in item.items() if key != self._source.column}
        if isinstance(old, np.ndarray):
            value = value.reshape(old.shape)
        return {key: value if key == self._source.column else other for key, other in item.items()}

    def close(self) -> None:
        """Write the list."""
        pickle.dump(self._dicts, self._sink, protocol=4)
        self._dicts = []


class TableEncoder:
    """Parquet or Arrow IPC: the columns and metadata of the input, the embeddings in their place.

    Parameters
    ----------
    kind
        "parquet", "file" or "stream".
    source
        A table whose columns are kept, a pickle or tar whose dicts or members become columns, or anything else, which
        has none.
    column
        The embeddings' column; None leaves them out, for a sidecar.
    """

    def __init__(
        self,
        sink: Sink,
        kind: str,
        source: Shard,
        column: str | None,
        dim: int,
        dtype: str,
        rename: dict[str, str],
    ) -> None:
        self._pa = pa = import_pyarrow(sink.path)
        self._sink = sink
        self._kind = kind
        self.column = column
        self._columns: Any = None
        if isinstance(source, LoadedPickle | LoadedTar):
            if isinstance(source, LoadedTar):
                schema = source.schema(rename.get(TAR_ID, TAR_ID))
            else:
                self._columns = _columns_of(pa, source, rename)
                schema = self._columns.schema
            place = len(schema)
            field = pa.field(column, pa.list_(pa.from_numpy_dtype(dtype), dim)) if column else None
        elif isinstance(source, ParquetShard | ArrowShard):
            place = source.schema.get_field_index(source.column)
            field = _with_value_type(pa, source.schema.field(place), dtype) if column else None
            schema = source.schema.remove(place)
        else:
            schema, place = pa.schema([]), 0
            field = pa.field(column, pa.list_(pa.from_numpy_dtype(dtype), dim))
        self._field, self._place = field, place
        self._schema = schema if field is None else schema.insert(place, field)
        self._group: NDArray[Any] | None = None
        self._pending: list[Any] = []
        self._num_pending = self._pending_bytes = 0
        self._dim, self._dtype = dim, dtype
        with arrow_errors(pa, sink.path):
            self._writer = self._open()

    def _open(self) -> Any:
        from pyarrow import ipc, parquet

        target = self._pa.PythonFile(self._sink, mode="w")
        if self._kind != "parquet":
            return (ipc.new_stream if self._kind == "stream" else ipc.new_file)(target, self._schema)
        # Floats of embeddings neither compress nor repeat: trying costs more than the transform.
        probe = io.BytesIO()
        parquet.write_table(self._schema.empty_table(), probe)
        leaves = parquet.ParquetFile(probe).schema
        paths = [leaves.column(i).path for i in range(len(leaves))]
        embeddings = [path for path in paths if path.split(".")[0] == self.column]
        others = [path for path in paths if path not in embeddings]
        return parquet.ParquetWriter(
            target,
            self._schema,
            compression={path: "NONE" if path in embeddings else "SNAPPY" for path in paths},
            use_dictionary=others,
            write_statistics=others,
        )

    def write(self, rows: Rows, chunk: Chunk) -> None:
        """Append the rows and their columns."""
        columns = chunk.columns if self._columns is None else self._columns.slice(chunk.start, len(rows.values))
        others = [] if columns is None else columns.columns
        with arrow_errors(self._pa, self._sink.path):
            if self._kind != "parquet":
                self._writer.write_batch(self._batch(rows.values, others))
            else:
                self._collect(rows.values, others)

    def _collect(self, values: NDArray[Any], others: list[Any]) -> None:
        if self._group is None:
            capacity = max(len(values), _GROUP_BYTES // (values.shape[1] * values.itemsize))
            self._group = np.empty((capacity, values.shape[1]), values.dtype)
        if self._num_pending + len(values) > len(self._group) or self._pending_bytes > _GROUP_BYTES:
            self._flush()
        if self.column is not None:
            self._group[self._num_pending : self._num_pending + len(values)] = values
        self._num_pending += len(values)
        self._pending.append(others)
        self._pending_bytes += sum(column.nbytes for column in others)

    def _flush(self) -> None:
        if self._group is None or not self._num_pending:
            return
        parts = [self._pa.concat_arrays(list(column)) for column in zip(*self._pending, strict=True)]
        batch = self._batch(self._group[: self._num_pending], parts)
        self._writer.write_batch(batch, row_group_size=max(1, batch.num_rows))
        self._pending, self._num_pending, self._pending_bytes = [], 0, 0

    def _batch(self, values: NDArray[Any], others: list[Any]) -> Any:
        arrays = list(others)
        if self._field is not None:
            arrays.insert(self._place, list_array(self._pa, values, self._field.type))
        return self._pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def close(self) -> None:
        """Write what is collected, and the footer."""
        with arrow_errors(self._pa, self._sink.path):
            self._flush()
            self._writer.close()


def _with_value_type(pa: Any, field: Any, dtype: str) -> Any:
    old = field.type
    value = old.value_field.with_type(pa.from_numpy_dtype(dtype))
    if pa.types.is_fixed_size_list(old):
        return field.with_type(pa.list_(value, old.list_size))
    return field.with_type(pa.large_list(value) if pa.types.is_large_list(old) else pa.list_(value))


def _columns_of(pa: Any, source: LoadedPickle, rename: dict[str, str]) -> Any:
    """Return the dicts of a pickle, less the embeddings, as a RecordBatch."""
    keys = dict.fromkeys(key for item in source.dicts for key in item if key != source.column)
    arrays = []
    for key in keys:
        try:
            arrays.append(pa.array([item.get(key) for item in source.dicts]))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{source.path}: the values of {key!r} do not make a column: {error}") from error
    names = [rename.get(key, key) if isinstance(key, str) else str(key) for key in keys]
    if not arrays:
        return pa.RecordBatch.from_struct_array(pa.array([{}] * len(source.dicts), pa.struct([])))
    return pa.RecordBatch.from_arrays(arrays, names=names)


def _check_plain(pa: Any, path: AnyPath, schema: Any, dropped: str) -> None:
    """Raise ValueError for columns whose values our own reader of pickles would refuse."""

    def plain(kind: Any) -> bool:
        t = pa.types
        if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
            return plain(kind.value_type)
        if t.is_struct(kind):
            return all(plain(kind.field(i).type) for i in range(kind.num_fields))
        if t.is_dictionary(kind):
            return plain(kind.value_type)
        checks = (t.is_boolean, t.is_integer, t.is_floating, t.is_string, t.is_large_string, t.is_binary)
        return any(check(kind) for check in (*checks, t.is_large_binary, t.is_fixed_size_binary, t.is_null))

    for field in schema:
        if field.name != dropped and not plain(field.type):
            raise ValueError(
                f"{path}: column {field.name!r} of type {field.type} has no plain values for a pickle: cast it"
            )


def open_encoders(
    shard: Shard,
    target: str,
    sink: Sink,
    sidecar: Callable[[], Sink],
    *,
    column: str | None,
    id_column: str,
    num_rows: int,
    dim: int,
    dtype: str,
) -> list[Encoder]:
    """Return the encoder of a file and, where the format `target` cannot hold all of `shard`, that of its sidecar."""
    if isinstance(shard, LoadedTar) and target == "tar":
        return [TarEncoder(sink, shard, dtype)]
    name = _column_name(shard, target, column)
    if isinstance(shard, LoadedTar):
        _check_extensions(shard, PICKLE_ID if target == "pickle" else id_column, name)
    main: Encoder
    match target:
        case "npy":
            main = NpyEncoder(sink, num_rows, dim, dtype)
        case "safetensors":
            same = shard if isinstance(shard, SafetensorsShard) else None
            main = SafetensorsEncoder(sink, same, name, num_rows, dim, dtype)
        case "pickle":
            if isinstance(shard, ParquetShard | ArrowShard):
                _check_plain(import_pyarrow(shard.path), shard.path, shard.schema, shard.column)
                _check_rename(shard, shard.schema.names, id_column, PICKLE_ID)
            rename = {} if isinstance(shard, LoadedTar) else {id_column: PICKLE_ID}
            main = PickleEncoder(sink, shard, name, rename)
        case _:
            if isinstance(shard, LoadedPickle) and shard.dicts:
                _check_rename(shard, list(shard.dicts[0]), PICKLE_ID, id_column)
            kind = "parquet" if target == "parquet" else _ipc_kind(shard)
            main = TableEncoder(sink, kind, shard, name, dim, dtype, {PICKLE_ID: id_column})
    if isinstance(shard, SafetensorsShard) and target != "safetensors" and (len(shard.tensors) > 1 or shard.metadata):
        return [main, SafetensorsEncoder(sidecar(), shard, None, num_rows, dim, dtype)]
    if target in ("npy", "safetensors"):
        if isinstance(shard, ParquetShard | ArrowShard) and len(shard.schema) > 1:
            kind = "parquet" if isinstance(shard, ParquetShard) else _ipc_kind(shard)
            return [main, TableEncoder(sidecar(), kind, shard, None, dim, dtype, {})]
        if isinstance(shard, LoadedPickle) and any(len(item) > 1 for item in shard.dicts):
            return [main, PickleEncoder(sidecar(), shard, None, {})]
        if isinstance(shard, LoadedTar):
            return [main, TableEncoder(sidecar(), "parquet", shard, None, dim, dtype, {TAR_ID: id_column})]
    return [main]


def _column_name(shard: Shard, target: str, column: str | None) -> str:
    """Return how the embeddings are called in the output: as they were where the format stays."""
    same = {
        "safetensors": SafetensorsShard,
        "pickle": LoadedPickle,
        "parquet": ParquetShard | ArrowShard,
        "arrow": ParquetShard | ArrowShard,
    }
    if target in same and isinstance(shard, same[target]) and shard.column:
        return str(shard.column)
    if isinstance(shard, LoadedTar):  # `column` is an extension
        column = None
    return column or (_PICKLE_COLUMN if target == "pickle" else DEFAULT_COLUMN)


def _ipc_kind(shard: Shard) -> str:
    return "stream" if isinstance(shard, ArrowShard) and shard.is_stream else "file"


def _check_rename(shard: Shard, names: list[str], old: str, new: str) -> None:
    if old != new and old in names and new in names:
        raise ValueError(
            f"{shard.path}: {old!r} would become {new!r}, which is there as well: choose another id_column"
        )


def _check_extensions(shard: LoadedTar, *columns: str) -> None:
    for name in columns:
        if name in shard.extensions:
            raise ValueError(
                f"{shard.path}: its members .{name} would be a second column {name!r}: rename them, or the ids by "
                "id_column"
            )


def read(shard: Shard, target: str, blocks: Blocks) -> Generator[Chunk, None, None]:
    """Read the chunks of `shard` with all that encoders of the format `target` need."""
    has_columns = isinstance(shard, ParquetShard | ArrowShard | LoadedPickle | LoadedTar) and target != "tar"
    return shard.chunks(blocks, columns=has_columns)
