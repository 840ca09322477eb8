"""The four row dtypes and how each lies in NumPy, which has no bfloat16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LINE_BYTES = 64
_LARGE_BYTES = 1 << 20

DTYPES = ("float16", "bfloat16", "float32", "float64")

_STORAGE: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def storage(dtype: str) -> np.dtype[Any]:
    """Return the native-endian NumPy dtype in which rows of `dtype` lie; bfloat16 lies in uint16.

    Raises
    ------
    ValueError
        If `dtype` is none of `DTYPES`.
    """
    try:
        return _STORAGE[dtype]
    except KeyError:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}") from None


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an uninitialised array whose data start on a cache line, where NumPy's large ones never do.

    Stores past the caches are twice as fast there: no two rows share a line.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE_BYTES:
        return np.empty(shape, dtype)
    buffer = np.empty(size + _LINE_BYTES, np.uint8)
    start = -buffer.ctypes.data % _LINE_BYTES
    return buffer[start : start + size].view(dtype).reshape(shape)


def own(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array, or a copy where it cannot be written: pickle gives such that lie in another's memory."""
    return array if array.flags.writeable else array.copy()


@dataclass(slots=True, eq=False)  # small batches come by the hundred thousand, and a named tuple costs twice as much
class Rows:
    """`(n, dim)` embeddings: `values` in `storage(dtype)`, last axis contiguous, any row stride."""

    values: NDArray[Any]
    dtype: str

    @property
    def bfloat16(self) -> bool:
        """Whether `values` holds bfloat16 bits."""
        return self.dtype == "bfloat16"


def to_float64(rows: Rows) -> NDArray[np.float64]:
    """Return the rows as `(n, dim)` float64."""
    if rows.bfloat16:
        return (rows.values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return rows.values.astype(np.float64)


def from_float64(values: NDArray[np.float64], out: Rows) -> None:
    """Write `(n, dim)` float64 to rows: to the nearest float32, and from there to the nearest of a smaller dtype."""
    with np.errstate(over="ignore"):
        if out.dtype == "float64":
            out.values[...] = values
        elif out.bfloat16:
            bits = values.astype(np.float32).view(np.uint32)
            out.values[...] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        else:
            out.values[...] = values.astype(np.float32)
