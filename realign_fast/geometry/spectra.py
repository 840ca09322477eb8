"""How variance is spread over directions, and how angles are between the rows of a set.

Eigenvalues are those of a covariance of unit rows; those above 1e-6 of the largest count as positive, since statistics
of float32 rows hold no more digits. All in float64.

Source: ReAlign (arXiv 2602.07026) for the exponent and the angles; AnisoAlign (arXiv 2605.07825) for the comparisons of
covariances, the anisotropy, the effective dimension and the correlation of cosines; Roy and Vetterli, The effective
rank, 2007.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._spectral import SMALLEST_SHARE, spectrum
from ..methods import check_count
from ..moments import Moments
from ._rows import unit_rows

__all__ = [
    "PowerLaw",
    "angular_js",
    "anisotropy",
    "cosine_density",
    "covariance_gap",
    "effective_dimension",
    "effective_rank",
    "eigenvalues",
    "pairwise_correlation",
    "spectrum_correlation",
    "spectrum_exponent",
    "subspace_overlap",
]

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_FIRST_RANK = 10
_ROWS_AT_A_TIME = 512
# A standard deviation of cosines below this is rounding.
_LEAST_SPREAD = 1e-10


def eigenvalues(covariance: Moments | ArrayLike) -> Vector:
    """Return the eigenvalues `(dim,)` of a covariance `(dim, dim)`, or of that of moments, largest first, none below 0.

    ValueError where it is no finite square matrix, or none was collected.
    """
    return spectrum(_matrix(covariance, "covariance"), "covariance").values[::-1].copy()


def _matrix(covariance: Moments | ArrayLike, name: str) -> Matrix:
    matrix = covariance.covariance if isinstance(covariance, Moments) else np.asarray(covariance, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"{name} must be Moments or a covariance of shape (dim, dim), got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite")
    if np.abs(matrix - matrix.T).max() > SMALLEST_SHARE * np.abs(matrix).max():
        raise ValueError(f"{name} must be symmetric")
    return matrix


def _matrices(source: Moments | ArrayLike, target: Moments | ArrayLike) -> tuple[Matrix, Matrix]:
    ours, theirs = _matrix(source, "source"), _matrix(target, "target")
    if ours.shape != theirs.shape:
        raise ValueError(f"source has dimension {len(ours)}, target has dimension {len(theirs)}")
    return ours, theirs


def _largest_first(values: ArrayLike, name: str = "values") -> Vector:
    """Return eigenvalues in order, those below 0 as 0. ValueError unless they are finite and some are positive."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.isfinite(array).all() or not (array > 0).any():
        raise ValueError(f"{name} must be finite eigenvalues of shape (dim,), some of them positive")
    return np.maximum(np.sort(array)[::-1], 0)


def _num_positive(values: Vector) -> int:
    return int((values > SMALLEST_SHARE * values[0]).sum())


@dataclass(frozen=True)
class PowerLaw:
    """`eigenvalue ~ rank**-exponent`, over ranks from one to another, both counted, the largest having rank 1."""

    exponent: float
    ranks: tuple[int, int]


def spectrum_exponent(values: ArrayLike, ranks: tuple[int, int] | None = None) -> PowerLaw:
    """Return minus the slope of log eigenvalue against log rank, by least squares over a range of ranks.

    Parameters
    ----------
    values
        Eigenvalues `(dim,)` in any order.
    ranks
        First and last, both counted, from 1; by default 10 and half the number of positive eigenvalues: of n rows,
        `min(dim, n - 1) // 2`, as the smallest are mostly a matter of how many rows there are.

    Raises
    ------
    ValueError
        If the range holds fewer than two ranks, or an eigenvalue that does not count as positive.
    """
    ordered = _largest_first(values)
    positive = _num_positive(ordered)
    first, last = (_FIRST_RANK, positive // 2) if ranks is None else ranks
    if not 1 <= first < last <= positive:
        raise ValueError(
            f"ranks must be a first and a later last one between 1 and {positive}, the number of eigenvalues above "
            f"{SMALLEST_SHARE:.0e} of the largest, got {(first, last)}" + (" by default" if ranks is None else "")
        )
    x, y = np.log(np.arange(first, last + 1)), np.log(ordered[first - 1 : last])
    x -= x.mean()
    return PowerLaw(float(-(x @ y) / (x @ x)), (first, last))


def effective_rank(values: ArrayLike) -> float:
    """Return the exponential of the entropy of eigenvalues `(dim,)` that are divided by their sum: 1 to `dim`."""
    ordered = _largest_first(values)
    shares = ordered[ordered > 0] / ordered.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def anisotropy(values: ArrayLike) -> float:
    """Return the largest of eigenvalues `(dim,)` over their mean, A_r: 1 to `dim`."""
    ordered = _largest_first(values)
    return float(ordered[0] / ordered.mean())


def effective_dimension(values: ArrayLike) -> float:
    """Return the squared sum of eigenvalues `(dim,)` over the sum of their squares, d_eff: 1 to `dim`."""
    ordered = _largest_first(values)
    shares = ordered / ordered.sum()
    return float(1 / (shares @ shares))


def covariance_gap(source: Moments | ArrayLike, target: Moments | ArrayLike) -> float:
    """Return `||Sx - Sy|| / ||Sx||` in the Frobenius norm, G_Sigma; `Sy` is of the source, `Sx` of the target.

    Both are moments or covariances `(dim, dim)`. ValueError where they do not fit together, or `Sx` is 0.
    """
    ours, theirs = _matrices(source, target)
    norm = float(np.linalg.norm(theirs))
    if norm == 0:
        raise ValueError("target has no variance, against which that of source could be measured")
    return float(np.linalg.norm(theirs - ours)) / norm


def spectrum_correlation(source: ArrayLike, target: ArrayLike) -> float:
    """Return the correlation of the logarithms of eigenvalues of equal rank, C_lambda: `source`, `target` `(dim,)`.

    Over the ranks at which both count as positive. ValueError where these are fewer than 3, or all eigenvalues of a set
    are equal there.
    """
    ours, theirs = _largest_first(source, "source"), _largest_first(target, "target")
    if len(ours) != len(theirs):
        raise ValueError(f"source has {len(ours)} eigenvalues, target has {len(theirs)}")
    common = min(_num_positive(ours), _num_positive(theirs))
    if common < 3:
        raise ValueError(f"a correlation needs 3 eigenvalues that are positive in source and target, got {common}")
    logs = [np.log(values[:common]) for values in (ours, theirs)]
    for name, each in zip(("source", "target"), logs, strict=True):
        if each.std() < _LEAST_SPREAD:
            raise ValueError(f"all eigenvalues of {name} are equal, and correlate with nothing")
    return float(np.corrcoef(np.stack(logs))[0, 1])


def subspace_overlap(source: Moments | ArrayLike, target: Moments | ArrayLike, q: int) -> float:
    """Return `||Ux^T Uy||^2 / q` of the `q` principal directions of two covariances, O_q: 1 where they span the same.

    `source` and `target` are moments or covariances `(dim, dim)`. Two random subspaces give `q / dim`. ValueError where
    they do not fit together, or have fewer than `q` positive eigenvalues.
    """
    check_count("q", q, least=1)
    spectra = [
        spectrum(matrix, name) for matrix, name in zip(_matrices(source, target), ("source", "target"), strict=True)
    ]
    for of in spectra:
        if of.rank < q:
            raise ValueError(f"q must be at most {of.rank}, the number of positive eigenvalues of {of.name}, got {q}")
    ours, theirs = (of.vectors[:, -q:] for of in spectra)
    return float(np.square(ours.T @ theirs).sum() / q)


def _sample(count: int, num_rows: int, seed: int) -> NDArray[np.intp]:
    """Return which of `count` rows to look at, in order: all, or so many chosen at random."""
    check_count("num_rows", num_rows, least=2)
    if count <= num_rows:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, num_rows, replace=False))


def _cosines(*sets: Matrix) -> Iterator[list[Vector]]:
    """Yield the cosines of all pairs of unit rows `i < j`, some pairs at a time, the same pairs of each set."""
    count = len(sets[0])
    for start in range(0, count, _ROWS_AT_A_TIME):
        of_pairs = [unit[start : start + _ROWS_AT_A_TIME] @ unit[start:].T for unit in sets]
        later = np.triu(np.ones(of_pairs[0].shape, bool), 1)
        yield [cosines[later] for cosines in of_pairs]


def _mean_of_cosines(unit: Matrix) -> float:
    total = unit.sum(axis=0)
    return float((total @ total - len(unit)) / (len(unit) * (len(unit) - 1)))


def pairwise_correlation(before: object, after: object, *, num_rows: int = 4000, seed: int = 0) -> float:
    """Return the correlation between the cosines of all pairs of rows before and after a map, Psi.

    Parameters
    ----------
    before, after
        The same rows `(n, dim)` and `(n, other_dim)` before and after.
    num_rows, seed
        Of more rows than that, so many are chosen at random.

    Raises
    ------
    ValueError
        If the sets differ in length, have fewer than 3 rows or bad ones, or all pairs of a set have the same cosine.
    """
    ours, theirs = unit_rows(before, "before", least=3), unit_rows(after, "after", least=3)
    if len(ours) != len(theirs):
        raise ValueError(f"after must have the {len(ours)} rows of before, got {len(theirs)}")
    chosen = _sample(len(ours), num_rows, seed)
    ours, theirs = ours[chosen], theirs[chosen]
    means = _mean_of_cosines(ours), _mean_of_cosines(theirs)
    products = np.zeros((2, 2))
    for of_pairs in _cosines(ours, theirs):
        departures = np.stack([cosines - mean for cosines, mean in zip(of_pairs, means, strict=True)])
        products += departures @ departures.T
    spreads = np.sqrt(products.diagonal())
    for name, spread in zip(("before", "after"), spreads, strict=True):
        if spread < _LEAST_SPREAD * len(ours):
            raise ValueError(f"all pairs of rows of {name} have the same cosine, and correlate with nothing")
    return float(products[0, 1] / (spreads[0] * spreads[1]))


def _shares_by_cosine(rows: object, name: str, num_rows: int, bins: int, seed: int) -> Vector:
    """Return the share of the pairs in each bin, `(bins,)`."""
    check_count("bins", bins, least=1)
    unit = unit_rows(rows, name, least=2)
    unit = unit[_sample(len(unit), num_rows, seed)]
    counts = np.zeros(bins, np.int64)
    for (cosines,) in _cosines(unit):
        counts += np.histogram(np.clip(cosines, -1, 1), bins, (-1, 1))[0]
    shares: Vector = counts / counts.sum()
    return shares


def cosine_density(rows: object, *, num_rows: int = 4000, bins: int = 200, seed: int = 0) -> tuple[Vector, Vector]:
    """Return the density of the cosines between the rows of a set, over [-1, 1].

    Parameters
    ----------
    rows
        `(n, dim)`, of which all pairs `i < j` are looked at.
    num_rows, seed
        Of more rows than that, so many are chosen at random.
    bins
        Of equal width.

    Returns
    -------
    edges : ndarray
        `(bins + 1,)`.
    density : ndarray
        `(bins,)`; times the width of a bin, the share of the pairs in it.

    Raises
    ------
    ValueError
        If there are fewer than 2 rows, or bad ones.
    """
    shares = _shares_by_cosine(rows, "rows", num_rows, bins, seed)
    return np.linspace(-1, 1, bins + 1), shares * (bins / 2)


def angular_js(source: object, target: object, *, num_rows: int = 4000, bins: int = 200, seed: int = 0) -> float:
    """Return the Jensen-Shannon divergence, in bits (base 2), between the angles in one set and those in another.

    Of the histograms of cosines that `cosine_density` makes of `source` `(n, dim)` and of `target` `(m, dim)`, with
    `num_rows`, `bins` and `seed` as it takes them: 0 where they agree, 1
    where they have no bin in common. Raises as it does.
    """
    ours = _shares_by_cosine(source, "source", num_rows, bins, seed)
    theirs = _shares_by_cosine(target, "target", num_rows, bins, seed)
    return jensen_shannon(ours, theirs)


def jensen_shannon(p: Vector, q: Vector) -> float:
    """Return the Jensen-Shannon divergence, in bits, of two distributions `(n,)`."""
    middle = (p + q) / 2
    return float(sum((part[part > 0] * np.log2(part[part > 0] / middle[part > 0])).sum() for part in (p, q)) / 2)
