"""The .npy format, versions 1 to 3."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Generator
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from .._dtypes import storage
from .._rows import dtype_name
from ._raw import Blocks, Chunk, Layout, check_shape, read_layout
from ._remote import AnyPath, size_of

_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000  # NumPy's own bound: the parser of literals is not made for more
MAX_START_BYTES = 12 + _MAX_HEADER_BYTES
_KEYS = {"descr", "fortran_order", "shape"}
# Python 3.11 counts the depth of its parser in one place for all threads, and raises SystemError where two meet there.
_parsing = Lock()


class NpyShard:
    """One `.npy` file of shape `(num_rows, dim)`."""

    decoded = False

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.layout = _layout_of(path)
        self.num_rows, self.dim, self.dtype = self.layout.num_rows, self.layout.dim, self.layout.dtype
        self.ranges = self.layout.ranges

    def chunks(self, blocks: Blocks, *, columns: bool = False) -> Generator[Chunk, None, None]:
        """Read the rows; there are no other columns."""
        return read_layout(self.path, self.layout, blocks)


def _layout_of(path: AnyPath) -> Layout:
    size = size_of(path)
    with path.open("rb") as file:
        array = parse(str(path), file.read(MAX_START_BYTES), size)
    if len(array.shape) != 2:
        raise ValueError(f"{path}: expected an array of shape (rows, dim), got {array.shape!r}")
    num_rows, dim = array.shape
    check_shape(path, num_rows, dim)
    check_size(str(path), array, size)
    fortran = array.fortran and 1 not in array.shape
    return Layout(array.offset, num_rows, dim, array.dtype, array.swapped, fortran)


class Array(NamedTuple):
    """What an npy header says, and at which byte the values begin."""

    shape: tuple[int, ...]
    dtype: str
    swapped: bool
    fortran: bool
    offset: int


def parse(name: str, start: bytes, size: int) -> Array:
    """Return what the first bytes `start` of an npy file say; at most `MAX_START_BYTES` of its `size` are needed.

    Raises
    ------
    ValueError
        If the header is damaged, or the array of another dtype than float16, float32 or float64; it begins with `name`.
    """
    if start[:6] != _MAGIC or len(start) < 10:
        raise ValueError(f"{name} is no npy file: it begins with {start[:6]!r}, expected {_MAGIC!r}")
    version = start[6]
    if version not in (1, 2, 3):
        raise ValueError(f"{name}: npy version {version} is unknown, expected 1, 2 or 3")
    begin = 10 if version == 1 else 12
    length = int.from_bytes(start[8:begin], "little")
    if length > min(_MAX_HEADER_BYTES, size - begin):
        raise ValueError(f"{name}: the header claims {length} bytes, expected at most {_MAX_HEADER_BYTES}")
    header = _parse_header(name, start[begin : begin + length], "utf-8" if version == 3 else "latin1")
    shape = header["shape"]
    if not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
        raise ValueError(f"{name}: expected an array of shape (rows, dim), got {shape!r}")
    dtype, swapped = _parse_dtype(name, header["descr"])
    return Array(shape, dtype, swapped, bool(header["fortran_order"]), begin + length)


def check_size(name: str, array: Array, size: int) -> None:
    """Raise ValueError unless a file of `size` bytes holds the array and nothing else."""
    expected = array.offset + math.prod(array.shape) * storage(array.dtype).itemsize
    if size != expected:
        raise ValueError(f"{name}: expected {expected} bytes for shape {array.shape} of {array.dtype}, found {size}")


def _parse_header(name: str, text: bytes, encoding: str) -> dict[str, Any]:
    try:
        with _parsing:
            header = ast.literal_eval(text.decode(encoding).strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{name}: the npy header is damaged: {error}") from None
    if not isinstance(header, dict) or set(header) != _KEYS:
        raise ValueError(f"{name}: the npy header must hold {sorted(_KEYS)}")
    return header


def _parse_dtype(name: str, descr: object) -> tuple[str, bool]:
    if not isinstance(descr, str) or not re.fullmatch(r"[<>=|]?[a-zA-Z?]\d{0,4}", descr):
        raise ValueError(f"{name}: expected an array of float16, float32 or float64, got {str(descr)[:40]}")
    try:
        dtype = np.dtype(descr)
        return dtype_name(dtype), not dtype.isnative
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
