"""Sums of products of unit rows about a pilot: what a covariance is made of.

The pilot, a point near the mean, keeps digits: sums about zero would be hardly larger than the squared mean that is
subtracted from them. Merged by the formula of Chan, Golub and LeVeque (Updating formulae and a pairwise
algorithm for computing sample variances, 1979).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._dtypes import own

Matrix = NDArray[np.float64]


class Products:
    """`sums` `(dim, dim)`, of `(u - pilot)(u - pilot)^T`: the lower triangle; what is above it means nothing.

    Attributes
    ----------
    pilot : ndarray
        `(dim,)` float64, of float32 numbers: the same for kernels of either precision.
    chosen : bool
        Whether there is a pilot yet.
    error : float or None
        Of products that are not exact, as measured.
    """

    __slots__ = ("chosen", "error", "pilot", "sums")

    def __init__(self, dim: int) -> None:
        self.chosen = False
        self.error: float | None = None
        self.pilot: NDArray[np.float64] = np.zeros(dim)
        self.sums: Matrix = np.zeros((dim, dim))

    def choose_pilot(self, mean: NDArray[np.float64]) -> None:
        """Take the mean of some rows, before any is added."""
        self.pilot = _rounded(mean)
        self.chosen = True

    def move_pilot(self, mean: NDArray[np.float64], count: int, total: NDArray[np.float64]) -> None:
        """Take another mean, with `count` rows in the sums, whose own sum is `total` `(dim,)`."""
        if count:
            self.sums = self.about(_rounded(mean), count, total)
        self.choose_pilot(mean)

    def add_zeros(self, count: int) -> None:
        """Add so many zero vectors."""
        if count:
            self.sums += count * np.outer(self.pilot, self.pilot)
            self.chosen = True

    def about(self, pilot: NDArray[np.float64], count: int, total: NDArray[np.float64]) -> Matrix:
        """Return the sums about another pilot, given the number of rows and their sum `(dim,)`."""
        shift = self.pilot - pilot
        mixed = np.outer(total - count * self.pilot, shift)
        about: Matrix = self.sums + mixed + mixed.T + count * np.outer(shift, shift)
        return about

    def covariance(self, count: int, mean: NDArray[np.float64]) -> Matrix:
        """Return it, symmetric, ddof 0."""
        offset = mean - self.pilot
        lower = np.tril(self.sums / count - np.outer(offset, offset))
        covariance: Matrix = lower + np.tril(lower, -1).T
        return covariance

    def copy(self) -> Products:
        """Return an independent copy."""
        copied = Products(len(self.pilot))
        copied.chosen, copied.error, copied.pilot = self.chosen, self.error, self.pilot
        copied.sums = self.sums.copy()
        return copied

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        for name, value in state[1].items():
            setattr(self, name, value)
        self.pilot, self.sums = own(self.pilot), own(self.sums)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Products):
            return NotImplemented
        return np.array_equal(self.pilot, other.pilot) and np.array_equal(np.tril(self.sums), np.tril(other.sums))

    __hash__ = None  # type: ignore[assignment]  # a mutable value


def _rounded(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    return mean.astype(np.float32).astype(np.float64)
