"""The four row dtypes and how each lies in NumPy, which has no bfloat16."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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


class Rows(NamedTuple):
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
