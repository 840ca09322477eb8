"""The safetensors format: an 8-byte length, a JSON header, then the tensors without gaps."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from typing import Any, NamedTuple, NoReturn

from .._dtypes import storage
from .._rows import dtype_name
from ._raw import Blocks, Chunk, Layout, check_shape, read_layout
from ._remote import AnyPath, size_of

DTYPE_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_NAMES = {code: name for name, code in DTYPE_CODES.items()}
_INTEGERS = {
    f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
_MAX_HEADER_BYTES = 16 << 20
METADATA = "__metadata__"


class Tensor(NamedTuple):
    """One tensor's entry: its dtype code, its shape and its bytes, counted from the end of the header."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsShard:
    """One `.safetensors` file; the rows are the tensor `column`, or the only 2-D float one where `column` is None."""

    decoded = False

    def __init__(self, path: AnyPath, column: str | None) -> None:
        self.path = path
        self.tensors, self.metadata, self.data_start = parse(path)
        self.column = self._choose(column)
        tensor = self.tensors[self.column]
        dtype = self.dtype = _NAMES[tensor.code]
        self.num_rows, self.dim = tensor.shape
        check_shape(path, self.num_rows, self.dim)
        expected = self.num_rows * self.dim * storage(dtype).itemsize
        if tensor.end - tensor.begin != expected:
            raise ValueError(
                f"{path}: tensor {self.column!r} of shape {tensor.shape} and {dtype} needs {expected} bytes, "
                f"its offsets give {tensor.end - tensor.begin}"
            )
        offset = self.data_start + tensor.begin
        self.layout = Layout(offset, self.num_rows, self.dim, dtype, swapped=sys.byteorder == "big")
        self.ranges = self.layout.ranges

    def chunks(self, blocks: Blocks, *, columns: bool = False) -> Generator[Chunk, None, None]:
        """Read the rows; other tensors are no columns."""
        return read_layout(self.path, self.layout, blocks)

    def _choose(self, column: str | None) -> str:
        fitting = [name for name, t in self.tensors.items() if t.code in _NAMES and len(t.shape) == 2]
        found = {name: f"{t.code} {list(t.shape)}" for name, t in self.tensors.items()}
        if column is None:
            if len(fitting) == 1:
                return fitting[0]
            column = "embedding"
            if column not in self.tensors or (len(fitting) > 1 and column not in fitting):
                raise ValueError(f"{self.path}: name the tensor of embeddings by `column`; it holds {found}")
        elif column not in self.tensors:
            raise ValueError(f"{self.path}: no tensor {column!r}; it holds {found}")
        tensor = self.tensors[column]
        if tensor.code in _INTEGERS:
            try:
                dtype_name(_INTEGERS[tensor.code], name=f"tensor {column!r}")
            except TypeError as error:
                raise ValueError(f"{self.path}: {error}") from None
        if column not in fitting:
            raise ValueError(
                f"{self.path}: tensor {column!r} must be (rows, dim) of F16, BF16, F32 or F64, got {found[column]}"
            )
        return column


def parse(path: AnyPath) -> tuple[dict[str, Tensor], dict[str, str], int]:
    def damaged(what: str) -> NoReturn:
        raise ValueError(f"{path}: the safetensors header is damaged: {what}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    size = size_of(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            damaged(f"it claims {length} bytes, the file has {size}, at most {_MAX_HEADER_BYTES} are allowed")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            damaged(f"{error}")
    if not isinstance(header, dict):
        damaged("it is no object")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        damaged(f"{METADATA} must hold strings")
    tensors = {}
    for name, entry in header.items():
        try:
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            damaged(f"entry {name!r} must hold dtype, shape and data_offsets")
        if type(code) is not str or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            damaged(f"entry {name!r} holds {str(entry)[:200]}")
        tensors[name] = Tensor(code, shape, begin, end)
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.begin != position or tensor.end < tensor.begin:
            damaged(f"tensor {name!r} begins at byte {tensor.begin}, expected {position}")
        position = tensor.end
    if 8 + length + position != size:
        raise ValueError(f"{path}: expected {8 + length + position} bytes by its header, found {size}")
    return tensors, metadata, 8 + length
