"""Symmetric matrices by their eigenvalues, in float64: shrinkage, powers, principal directions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .moments import Moments

Matrix = NDArray[np.float64]
Shrinkage = float | str | None

# Statistics of float32 rows hold about seven digits: eigenvalues below this share of the largest are their noise.
SMALLEST_SHARE = 1e-6
_NAMED = ("ledoit_wolf", "oas")
KINDS = ("zca", "pca", "cholesky")


def check_shrinkage(shrinkage: object) -> None:
    """Raise unless it is None, "ledoit_wolf", "oas" or a number in [0, 1]."""
    if shrinkage is None or shrinkage in _NAMED:
        return
    if isinstance(shrinkage, bool | str) or not isinstance(shrinkage, int | float):
        raise ValueError(f"shrinkage must be None, a number in [0, 1], {' or '.join(_NAMED)}, got {shrinkage!r}")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A covariance `sum_i values[i] vectors[:, i] vectors[:, i]^T`.

    Attributes
    ----------
    name : str
        Of the set, for messages.
    values : ndarray
        `(dim,)`, ascending, none below 0.
    vectors : ndarray
        `(dim, dim)`, orthonormal columns.
    shrinkage : float
        The weight of the identity in it.
    """

    name: str
    values: NDArray[np.float64]
    vectors: Matrix
    shrinkage: float

    @cached_property
    def rank(self) -> int:
        """How many eigenvalues stand above the noise of the statistics."""
        return int((self.values > SMALLEST_SHARE * self.values[-1]).sum())

    def power(self, exponent: float) -> Matrix:
        """Return the matrix to this power.

        Raises
        ------
        ValueError
            If the exponent is negative and the matrix has no inverse.
        """
        if exponent < 0:
            self.check_rank(len(self.values))
        power: Matrix = (self.vectors * self.values**exponent) @ self.vectors.T
        return power

    def num_holding(self, energy: float) -> int:
        """Return how many of the largest eigenvalues hold this share of the trace, of (0, 1]; else ValueError."""
        if not 0 < energy <= 1:
            raise ValueError(f"energy must lie in (0, 1], got {energy}")
        held = np.cumsum(self.values[::-1]) / self.values.sum()
        return int(np.searchsorted(held, energy - 1e-12)) + 1

    def shrunken(self, weight: float) -> Spectrum:
        """Return that of `(1 - weight) Sigma + weight tr(Sigma) / dim I`."""
        values = (1 - weight) * self.values + weight * self.values.mean()
        return Spectrum(self.name, values, self.vectors, weight)

    def check_rank(self, needed: int) -> None:
        """Raise ValueError unless so many directions carry variance."""
        if self.rank < needed:
            raise ValueError(
                f"the covariance of {self.name} has rank {self.rank} of {len(self.values)}, and {needed} is needed: "
                'give more rows, fewer components, or shrinkage= (a number in (0, 1], "ledoit_wolf" or "oas")'
            )


def spectrum(matrix: Matrix, name: str, shrinkage: float = 0.0) -> Spectrum:
    """Return the eigenvalues and directions of `(1 - shrinkage) matrix + shrinkage tr(matrix) / dim I`."""
    values, vectors = np.linalg.eigh(matrix)
    return Spectrum(name, np.maximum(values, 0), vectors, 0.0).shrunken(shrinkage)


def shrinkage_of(moments: Moments, shrinkage: Shrinkage) -> float:
    """Return the weight of the identity that is meant, see `check_shrinkage`."""
    check_shrinkage(shrinkage)
    if shrinkage == "ledoit_wolf":
        return ledoit_wolf(moments, moments.covariance)
    if shrinkage == "oas":
        return oas(moments.count, moments.covariance)
    return float(shrinkage or 0)


def spectrum_of(moments: Moments, shrinkage: Shrinkage, name: str) -> Spectrum:
    """Return that of a set's covariance, shrunken.

    Raises
    ------
    ValueError
        If no covariance was collected, or `shrinkage` is not what `check_shrinkage` allows.
    """
    weight = shrinkage_of(moments, shrinkage)
    return spectrum(moments.covariance, name, weight)


def with_signs(directions: Matrix) -> Matrix:
    """Return the columns with their largest element positive: either sign is right, this one is always the same."""
    signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])])
    signed: Matrix = signs * directions
    return signed


def whitening_matrix(of: Spectrum, kind: str, num_components: int | None = None) -> Matrix:
    """Return `W` `(n, dim)` with `W Sigma W^T = I`; for "pca" the directions of largest variance come first.

    Raises
    ------
    ValueError
        If the kind is unknown, or the covariance has too low a rank.
    """
    dim = len(of.values)
    count = dim if num_components is None else num_components
    of.check_rank(count)
    values, vectors = of.values[::-1][:count], of.vectors[:, ::-1][:, :count]
    if kind == "pca":
        directions: Matrix = (with_signs(vectors) / np.sqrt(values)).T
        return directions
    if kind == "zca":
        symmetric: Matrix = (vectors / np.sqrt(values)) @ vectors.T
        return symmetric
    if kind == "cholesky":
        # Of the precision: W = L^T with L L^T = Sigma^-1, so that W Sigma W^T = I.
        triangular: Matrix = np.linalg.cholesky(of.power(-1)).T.astype(np.float64)
        return triangular
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def transport_matrix(source: Spectrum, target: Spectrum) -> Matrix:
    """Return `Sy^(-1/2) (Sy^(1/2) Sx Sy^(1/2))^(1/2) Sy^(-1/2)`: of the maps from one Gaussian to another the shortest.

    Source: Peyre and Cuturi, Computational optimal transport, remark 2.31.
    """
    root, inverse_root = source.power(0.5), source.power(-0.5)
    return inverse_root @ spectrum(root @ target.power(1) @ root, "both").power(0.5) @ inverse_root


def ledoit_wolf(moments: Moments, covariance: Matrix) -> float:
    """Return the weight of the identity that minimises the expected squared error.

    Of unit rows it follows from mean and covariance: with `q = ||mean||**2` and a share `p` of rows that are not zero,
    `E ||u - mean||**4 = p (1 + q)**2 - 4 (1 + q) q + 4 mean^T E[u u^T] mean + (1 - p) q**2`.

    Source: Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004.
    """
    dim, mean = len(covariance), moments.mean
    square = float(mean @ mean)
    share = 1 - moments.num_zero / moments.count
    fourth = (
        share * (1 + square) ** 2
        - 4 * (1 + square) * square
        + 4 * float(mean @ covariance @ mean + square**2)
        + (1 - share) * square**2
    )
    squares = float((covariance**2).sum())
    distance = squares - float(np.trace(covariance)) ** 2 / dim
    error = (fourth - squares) / moments.count
    return 1.0 if distance <= 0 else min(1.0, max(0.0, error / distance))


def oas(count: int, covariance: Matrix) -> float:
    """Return the weight of the identity, for Gaussian rows.

    Source: Chen, Wiesel, Eldar and Hero, Shrinkage algorithms for MMSE covariance estimation, 2010, the form without
    the terms of order `1 / dim` in the numerator that scikit-learn uses too.
    """
    dim = len(covariance)
    squares = float((covariance**2).mean())
    level = (float(np.trace(covariance)) / dim) ** 2
    denominator = (count + 1) * (squares - level / dim)
    return 1.0 if denominator <= 0 else min(1.0, (squares + level) / denominator)
