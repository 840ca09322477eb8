"""The .npy format, versions 1 to 3."""

from __future__ import annotations

import ast
import re
from collections.abc import Generator
from threading import Lock
from typing import Any

import numpy as np

from .._dtypes import storage
from .._rows import dtype_name
from ._raw import Blocks, Chunk, Layout, check_shape, read_layout
from ._remote import AnyPath, size_of

_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000  # NumPy's own bound: the parser of literals is not made for more
_KEYS = {"descr", "fortran_order", "shape"}
# Python 3.11 counts the depth of its parser in one place for all threads, and raises SystemError where two meet there.
_parsing = Lock()


class NpyShard:
    """One `.npy` file of shape `(num_rows, dim)`."""

    decoded = False

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.layout = _parse(path)
        self.num_rows, self.dim, self.dtype = self.layout.num_rows, self.layout.dim, self.layout.dtype
        self.ranges = self.layout.ranges

    def chunks(self, blocks: Blocks, *, columns: bool = False) -> Generator[Chunk, None, None]:
        """Read the rows; there are no other columns."""
        return read_layout(self.path, self.layout, blocks)


def _parse(path: AnyPath) -> Layout:
    size = size_of(path)
    with path.open("rb") as file:
        start = file.read(12)
        if start[:6] != _MAGIC or len(start) < 10:
            raise ValueError(f"{path} is no npy file: it begins with {start[:6]!r}, expected {_MAGIC!r}")
        version = start[6]
        if version not in (1, 2, 3):
            raise ValueError(f"{path}: npy version {version} is unknown, expected 1, 2 or 3")
        begin = 10 if version == 1 else 12
        length = int.from_bytes(start[8:begin], "little")
        if length > min(_MAX_HEADER_BYTES, size - begin):
            raise ValueError(f"{path}: the header claims {length} bytes, expected at most {_MAX_HEADER_BYTES}")
        file.seek(begin)
        header = _parse_header(path, file.read(length), "utf-8" if version == 3 else "latin1")
    shape, descr = header["shape"], header["descr"]
    if not isinstance(shape, tuple) or not all(type(n) is int for n in shape) or len(shape) != 2:
        raise ValueError(f"{path}: expected an array of shape (rows, dim), got {shape!r}")
    check_shape(path, *shape)
    dtype, swapped = _parse_dtype(path, descr)
    expected = begin + length + shape[0] * shape[1] * storage(dtype).itemsize
    if size != expected:
        raise ValueError(f"{path}: expected {expected} bytes for shape {shape} of {dtype}, found {size}")
    fortran = bool(header["fortran_order"]) and 1 not in shape
    return Layout(begin + length, shape[0], shape[1], dtype, swapped, fortran)


def _parse_header(path: AnyPath, text: bytes, encoding: str) -> dict[str, Any]:
    try:
        with _parsing:
            header = ast.literal_eval(text.decode(encoding).strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path}: the npy header is damaged: {error}") from None
    if not isinstance(header, dict) or set(header) != _KEYS:
        raise ValueError(f"{path}: the npy header must hold {sorted(_KEYS)}")
    return header


def _parse_dtype(path: AnyPath, descr: object) -> tuple[str, bool]:
    if not isinstance(descr, str) or not re.fullmatch(r"[<>=|]?[a-zA-Z?]\d{0,4}", descr):
        raise ValueError(f"{path}: expected an array of float16, float32 or float64, got {str(descr)[:40]}")
    try:
        dtype = np.dtype(descr)
        return dtype_name(dtype), not dtype.isnative
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
