"""The steps of a map that are more than two projections: a matrix before them, noise after them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._native import _C
from ._rows import is_tensor

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


def frozen(values: Vector) -> Vector:
    """Return a copy that cannot be written to."""
    values = np.array(values, np.float64, order="C")
    values.flags.writeable = False
    return values


@dataclass(frozen=True, eq=False)
class Affine:
    """`matrix u + offset` of unit rows `u`, computed as `matrix (u - centre) + (offset + matrix centre)`.

    With `centre` near the mean of the rows, no digits are lost where the matrix is large.

    Attributes
    ----------
    matrix : ndarray
        `(out_dim, dim)` float64.
    centre : ndarray
        `(dim,)` float64, of float32 numbers.
    offset : ndarray
        `(out_dim,)` float64.
    """

    matrix: Matrix
    centre: Vector
    offset: Vector

    @classmethod
    def about(cls, mean: Vector, matrix: Matrix, target: Vector) -> Affine:
        """Return the map that takes `mean` to `target`."""
        centre = mean.astype(np.float32).astype(np.float64)
        return cls(np.ascontiguousarray(matrix), centre, target - matrix @ mean)

    @cached_property
    def centred_offset(self) -> Vector:
        """What is added to `matrix (u - centre)`."""
        offset: Vector = self.offset + self.matrix @ self.centre
        return offset

    @cached_property
    def for_kernels(self) -> _C.AffineMap:
        """As the C++ kernels take it."""
        return _C.AffineMap(self.matrix, self.centre, self.centred_offset)

    def __call__(self, unit: Matrix) -> Matrix:
        """Map unit rows `(n, dim)` in float64; zeros, which stand for bad rows, stay zeros."""
        mapped = (unit - self.centre) @ self.matrix.T + self.centred_offset
        mapped[~unit.any(axis=1)] = 0
        return mapped

    @cached_property
    def _on_devices(self) -> dict[Any, Any]:
        return {}

    def on(self, key: Any, make: Callable[[Affine], Any]) -> Any:
        """Return what `make` makes of this for a device, dtype or the like, once for each `key`."""
        if key not in self._on_devices:
            self._on_devices[key] = make(self)
        return self._on_devices[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Affine, (self.matrix, self.centre, self.offset)


@dataclass(frozen=True, eq=False)
class Noise:
    """Gaussian noise that depends on the seed and a row's number alone, not on its batch.

    The numbers are those of Philox 4x32-10 with the seed as its key and (group, row, row >> 32, 0) as its counter, made
    Gaussian by Box and Muller. Element `j` takes number `j // g` of the four of group `j % g`, `g = ceil(dim / 4)`.

    Attributes
    ----------
    std : float
        Standard deviation of an element; rows have length one.
    seed : int
    index : ndarray or None
        `(n,)` int64, the numbers of the rows; where None, they count from `first`.
    first : int
    """

    std: float
    seed: int
    index: NDArray[np.int64] | None = None
    first: int = 0

    @classmethod
    def of(cls, std: float, seed: int, index: Any, shape: tuple[int, ...]) -> Noise | None:
        """Return the noise of rows of this shape `(...)`, None where there is none.

        Raises
        ------
        TypeError, ValueError
            If `std` is no number of at least 0, the seed no integer of 64 bits, or `index` has another shape.
        """
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"noise_std must be finite and at least 0, got {std}")
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
        if std == 0:
            return None
        if index is None or isinstance(index, int | np.integer):
            return cls(std, int(seed), None, int(index or 0))
        values = index.cpu().numpy() if is_tensor(index) else np.asarray(index)
        if values.dtype.kind not in "iu":
            raise TypeError(f"index must be integers, got {values.dtype}")
        if values.shape != shape:
            raise ValueError(f"index must be one integer or have one a row, shape {shape}, got {values.shape}")
        return cls(std, int(seed), np.ascontiguousarray(values.ravel(), np.int64))

    def of_rows(self, start: int, count: int) -> Noise:
        """Return the noise of so many rows from one on."""
        index = None if self.index is None else self.index[start : start + count]
        return Noise(self.std, self.seed, index, self.first + start)

    def numbers(self, count: int) -> NDArray[np.int64]:
        """Return the numbers of the rows, `(count,)`."""
        return np.arange(self.first, self.first + count) if self.index is None else self.index
