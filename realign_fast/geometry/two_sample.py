"""How different two sets of unit rows are, how sure that is, and what two samples of one distribution would give.

Sources: Gretton et al., A kernel two-sample test, JMLR 2012, for the mean discrepancy; Bonneel et al., Sliced and
Radon Wasserstein barycenters, 2015; Dowson and Landau, The Frechet distance between multivariate normal distributions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import erfc
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._spectral import spectrum
from ..methods import check_count
from ..moments import Moments
from .neighbors import Unit, unit_rows

__all__ = ["Distance", "frechet", "frechet_of_moments", "linear_mmd", "mmd", "sliced_wasserstein"]

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
# Of how many rows of either set; a permutation deals the labels anew, a bootstrap draws rows of each set anew.
Counts = NDArray[np.float64]

_FEWEST_ROWS = 4
# Squared distances of unit rows below this may be rounding; so may differences of distances of relabelled sets.
_ROUNDING, _TIE = 1e-11, 1e-7
_STANDARD_ERRORS, _ONE_SIDED = 1.959964, 1.644854
_BANDWIDTH_ROWS = 1000
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Distance:
    """A distance between two sets.

    Attributes
    ----------
    value : float
    interval : tuple of float
        95 %: the value and 1.96 standard deviations over bootstrap samples either way.
    null : float
        What the distance stays below in 95 % of all cases if both sets come from one distribution.
    p_value : float
        How often it would be as large as this if they do.
    num_rows : tuple of int
        Rows used of each set.
    num_resamples : int
        Of permutations, and of bootstrap samples; 0 where both come from a formula.
    seed : int
    """

    value: float
    interval: tuple[float, float]
    null: float
    p_value: float
    num_rows: tuple[int, int]
    num_resamples: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)


def mmd(source: Any, target: Any, *, num_rows: int = 2000, num_resamples: int = 200, seed: int = 0) -> Distance:
    """Return the unbiased estimate of the squared maximum mean discrepancy, which may be negative (JMLR 2012, eq. 3).

    The kernel is `exp(-||x - y||^2 / (2 s^2))`, `s` the median distance between the rows of both sets.

    Parameters
    ----------
    source, target
        `(n, dim)` and `(m, dim)` arrays or tensors.
    num_rows
        At most so many rows of each set, drawn by `seed`.
    num_resamples
        How many permutations of the labels, and bootstrap samples.
    seed
        Of all draws.

    Raises
    ------
    ValueError
        If a set has fewer than 4 rows, the dimensions differ, or a row is zero or not finite.
    TypeError
        If rows are not float16, bfloat16, float32 or float64.
    """
    sets = _sets(source, target, num_rows, seed)
    kernel = _kernel(np.concatenate(sets))
    sizes = len(sets[0]), len(sets[1])
    own = np.diag(kernel)

    def discrepancy(first: Counts, second: Counts) -> Vector:
        # A row drawn twice is a pair of equal rows; a row is no pair with itself.
        of_first, of_second = kernel @ first, kernel @ second
        within = [
            ((counts * product).sum(axis=0) - counts.T @ own) / (size * (size - 1))
            for counts, product, size in zip((first, second), (of_first, of_second), sizes, strict=True)
        ]
        found: Vector = within[0] + within[1] - 2 * (first * of_second).sum(axis=0) / (sizes[0] * sizes[1])
        return found

    return _resampled(discrepancy, sizes, num_resamples, seed)


def linear_mmd(source: Any, target: Any, *, seed: int = 0) -> Distance:
    """Return what `mmd` estimates in linear time, from all rows of `source` and `target` (JMLR 2012, section 6).

    It looks at each row once, with one other, in an order drawn by `seed`; interval, `null` and `p_value` are normal.
    Both sets are copied, as float32 of unit length. Raises as `mmd` does.
    """
    sets = _sets(source, target, None, seed)
    rng = np.random.default_rng(seed)
    half = min(map(len, sets)) // 2
    orders = [rng.permutation(len(rows))[: 2 * half] for rows in sets]
    some = np.concatenate([rows[order[:_BANDWIDTH_ROWS]] for rows, order in zip(sets, orders, strict=True)])
    scale = _bandwidth(_square_distances(some))
    terms = np.empty(half)
    for start in range(0, half, _CHUNK_ROWS):
        part = slice(start, min(start + _CHUNK_ROWS, half))
        (x, x2), (y, y2) = (
            (rows[order[:half][part]], rows[order[half:][part]]) for rows, order in zip(sets, orders, strict=True)
        )
        similar = [
            np.exp(-np.square(a - b, dtype=np.float64).sum(axis=1) * scale)
            for a, b in ((x, x2), (y, y2), (x, y2), (x2, y))
        ]
        terms[part] = similar[0] + similar[1] - similar[2] - similar[3]
    value, deviation = float(terms.mean()), float(terms.std(ddof=1) / np.sqrt(half))
    score = value / deviation if deviation else np.inf * np.sign(value) if value else 0.0
    return Distance(
        value,
        (value - _STANDARD_ERRORS * deviation, value + _STANDARD_ERRORS * deviation),
        _ONE_SIDED * deviation,
        0.5 * erfc(score / np.sqrt(2)),
        (2 * half, 2 * half),
        0,
        seed,
    )


def sliced_wasserstein(
    source: Any,
    target: Any,
    *,
    num_rows: int = 5000,
    num_projections: int = 128,
    num_resamples: int = 100,
    seed: int = 0,
) -> Distance:
    """Return the sliced 2-Wasserstein distance: the root of the mean square, over directions, of that of projections.

    Parameters that are not explained here, and what is raised, are those of `mmd`.

    Parameters
    ----------
    num_projections
        Random directions, drawn by `seed`.
    """
    check_count("num_projections", num_projections, least=1)
    sets = _sets(source, target, num_rows, seed)
    directions = projections(sets[0].shape[1], num_projections, seed)
    sizes = len(sets[0]), len(sets[1])
    projected = (np.concatenate(sets) @ directions.astype(np.float32)).T
    order = projected.argsort(axis=1)
    projected = np.take_along_axis(projected, order, axis=1)
    first, second, widths = _joint_quantiles(*sizes)

    def distance(ours: Counts, theirs: Counts) -> Vector:
        found = np.zeros(ours.shape[1])
        for resample, counts in enumerate(zip(ours.T.astype(np.intp), theirs.T.astype(np.intp), strict=True)):
            for line, places in zip(projected, order, strict=True):
                x, y = (np.repeat(line, each[places]) for each in counts)
                found[resample] += np.square(x[first] - y[second]) @ widths
        return np.sqrt(found / num_projections)

    return _resampled(distance, sizes, num_resamples, seed)


def projections(dim: int, num_projections: int, seed: int) -> Matrix:
    """Return `(dim, num_projections)` directions of length one, uniformly drawn."""
    drawn = np.random.default_rng(seed).standard_normal((dim, num_projections))
    directions: Matrix = drawn / np.linalg.norm(drawn, axis=0)
    return directions


def _joint_quantiles(num_first: int, num_second: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Return which row of each sorted set holds each part of the unit interval, and how long the part is."""
    # In units of 1 / (n m), so that no end of a part is rounded.
    ends = np.union1d(np.arange(1, num_first + 1) * num_second, np.arange(1, num_second + 1) * num_first)
    widths = np.diff(ends, prepend=0) / (num_first * num_second)
    return (ends - 1) // num_second, (ends - 1) // num_first, widths.astype(np.float32)


def frechet(source: Any, target: Any, *, num_rows: int = 5000, num_resamples: int = 20, seed: int = 0) -> Distance:
    """Return the squared Frechet distance of the Gaussians with the sets' means and covariances.

    It is biased upwards, and its interval with it, the more so the fewer rows there are against the dimension: `null`,
    of as many rows, tells how far. Each resample takes two decompositions of a matrix of the rows' dimension, or where
    both sets have fewer rows than that, one of a matrix of as many rows.

    The parameters, and what is raised, are those of `mmd`.
    """
    sets = _sets(source, target, num_rows, seed)
    both = np.concatenate(sets)
    few = max(map(len, sets)) < both.shape[1]

    def moments(counts: Vector) -> Moments:
        return Moments(both.shape[1], covariance=True).update(np.repeat(both, counts.astype(np.intp), axis=0))

    def distance(first: Counts, second: Counts) -> Vector:
        pairs = zip(first.T, second.T, strict=True)
        if few:
            return np.array([_frechet_of_few(both, *pair) for pair in pairs])
        return np.array([frechet_of_moments(*map(moments, pair)) for pair in pairs])

    return _resampled(distance, (len(sets[0]), len(sets[1])), num_resamples, seed)


def _frechet_of_few(rows: Unit, first: Vector, second: Vector) -> float:
    """Return the distance of fewer rows than dimensions, each counted so often in the two sets.

    Covariances `A'A` and `B'B` of weighted, centred rows `A` and `B`: the trace of the root of their product is the sum
    of the singular values of `AB'`.
    """
    means, centred = [], []
    for counts in (first, second):
        weights, some = counts[counts > 0, None] / counts.sum(), rows[counts > 0].astype(np.float64)
        means.append((weights * some).sum(axis=0))
        centred.append(np.sqrt(weights) * (some - means[-1]))
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    traces = sum(np.square(each).sum() for each in centred)
    return max(0.0, float(np.square(means[0] - means[1]).sum() + traces - 2 * cross))


def frechet_of_moments(source: Moments, target: Moments) -> float:
    """Return what `frechet` estimates of all rows of two sets, from moments of `source` and `target` with covariance.

    ValueError where the dimensions differ or no covariance was collected.
    """
    if source.dim != target.dim:
        raise ValueError(f"source has dimension {source.dim}, target has dimension {target.dim}")
    root = spectrum(source.covariance, "source").power(0.5)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ target.covariance @ root), 0)).sum()
    square = np.square(source.mean - target.mean).sum() + source.trace + target.trace - 2 * cross
    return max(0.0, float(square))


def _sets(source: Any, target: Any, num_rows: int | None, seed: int) -> tuple[Unit, Unit]:
    """Return unit rows of both sets, at most so many of each."""
    if num_rows is not None:
        check_count("num_rows", num_rows, least=_FEWEST_ROWS)
    ours = unit_rows(source, "source")
    theirs = unit_rows(target, "target", dim=ours.shape[1])
    for name, rows in (("source", ours), ("target", theirs)):
        if len(rows) < _FEWEST_ROWS:
            raise ValueError(f"{name} must have at least {_FEWEST_ROWS} rows, got {len(rows)}")
    rng = np.random.default_rng(seed)
    return _some(ours, num_rows, rng), _some(theirs, num_rows, rng)


def _some(rows: Unit, count: int | None, rng: np.random.Generator) -> Unit:
    if count is None or len(rows) <= count:
        return rows
    return rows[np.sort(rng.choice(len(rows), count, replace=False))]


def _square_distances(rows: Unit) -> Matrix:
    # Less their mean, float32 holds more of what tells rows of a narrow cloud apart.
    centred = rows - rows.mean(axis=0)
    squares = np.einsum("ij,ij->i", centred, centred).astype(np.float64)
    distances: Matrix = squares[:, None] + squares - 2 * (centred @ centred.T).astype(np.float64)
    return np.maximum(0, distances, out=distances)


def _bandwidth(squares: Matrix) -> float:
    """Return `1 / (2 s^2)`, `s^2` the median of the squared distances of distinct pairs; 0 where all rows are equal.

    Where most rows are equal it is their mean.
    """
    pairs = squares[np.triu_indices(len(squares), 1)]
    for square in (float(np.median(pairs)), float(pairs.mean())):
        if square > _ROUNDING:
            return 1 / (2 * square)
    return 0.0


def _kernel(rows: Unit) -> Matrix:
    squares = _square_distances(rows)
    kernel = np.exp(-squares * _bandwidth(squares))
    np.fill_diagonal(kernel, 1)
    return kernel


def _resampled(
    distance: Callable[[Counts, Counts], Vector], sizes: tuple[int, int], num_resamples: int, seed: int
) -> Distance:
    """Return a distance with its interval and its test.

    `distance` takes how often each row of both sets, one after the other, counts in the first and in the second set,
    `(n + m, resamples)` each.
    """
    check_count("num_resamples", num_resamples, least=2)
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    labels = np.arange(total) < sizes[0]
    dealt = np.stack([rng.permutation(labels) for _ in range(num_resamples)], axis=1).astype(np.float64)
    drawn = [np.zeros((total, num_resamples)) for _ in sizes]
    for counts, size, rows in zip(drawn, sizes, (labels, ~labels), strict=True):
        counts[rows] = rng.multinomial(size, np.full(size, 1 / size), num_resamples).T
    whole = labels[:, None].astype(np.float64)
    value = float(distance(whole, 1 - whole)[0])
    under_null = distance(dealt, 1 - dealt)
    margin = _STANDARD_ERRORS * float(distance(*drawn).std(ddof=1))
    return Distance(
        value,
        (value - margin, value + margin),
        float(np.quantile(under_null, 0.95)),
        float((1 + (under_null >= value - _TIE).sum()) / (1 + num_resamples)),
        sizes,
        num_resamples,
        seed,
    )
