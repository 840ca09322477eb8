"""What every kernel computes, in plain float64 NumPy: slow, dull, and the judge of the fast ones.

Source: ReAlign, arXiv 2602.07026, Anchor, Trace and Centroid alignment.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def project(rows: Matrix) -> Matrix:
    """Return `pi(z) = z / ||z||` of each row, `pi(0) = 0`, whatever the magnitude of the row."""
    largest = np.abs(rows).max(axis=-1, keepdims=True, initial=0)
    scaled = rows / np.where(largest == 0, 1, largest)
    norms = np.sqrt((scaled**2).sum(axis=-1, keepdims=True))
    unit: Matrix = scaled / np.where(norms == 0, 1, norms)
    return unit


def bad_rows(rows: Matrix) -> NDArray[np.bool_]:
    """Return `(n,)`: which rows hold a NaN or an infinity, or are zero."""
    bad: NDArray[np.bool_] = ~np.isfinite(rows).all(axis=-1) | (rows == 0).all(axis=-1)
    return bad


def row_transform(rows: Matrix, scale: float, shift: Matrix, correction: Matrix) -> Matrix:
    """Return `pi(pi(scale u + shift) + correction)`, `u = pi(row)`, of `(n, dim)` rows; zeros for bad ones."""
    bad = bad_rows(rows)[:, None]
    unit = project(np.where(bad, 0.0, rows))
    mapped = project(project(scale * unit + shift) + correction)
    return np.where(bad, 0.0, mapped)


def row_transform_backward(rows: Matrix, grad_out: Matrix, scale: float, shift: Matrix, correction: Matrix) -> Matrix:
    """Return the gradient with respect to `rows` of `sum(grad_out * row_transform(rows, ...))`; zeros for bad rows."""

    def through_projection(grad: Matrix, z: Matrix) -> Matrix:
        unit = project(z)
        norms = (unit * z).sum(axis=-1, keepdims=True)
        through: Matrix = (grad - unit * (grad * unit).sum(axis=-1, keepdims=True)) / np.where(norms == 0, 1, norms)
        return np.where(norms == 0, 0.0, through)

    bad = bad_rows(rows)[:, None]
    rows = np.where(bad, 1.0, rows)
    moved = scale * project(rows) + shift
    grad = through_projection(grad_out, project(moved) + correction)
    grad = through_projection(grad, moved)
    return np.where(bad, 0.0, through_projection(scale * grad, rows))


def moments(rows: Matrix) -> tuple[int, Matrix, float]:
    """Return count, mean `(dim,)` and covariance trace (ddof 0) of the unit rows, bad ones left out."""
    unit = project(rows[~bad_rows(rows)])
    mean = unit.mean(axis=0)
    return len(unit), mean, float(((unit - mean) ** 2).sum(axis=1).mean())


def covariance(rows: Matrix) -> tuple[int, Matrix, Matrix]:
    """Return count, mean `(dim,)` and covariance `(dim, dim)` (ddof 0) of the unit rows, bad ones left out."""
    unit = project(rows[~bad_rows(rows)])
    mean = unit.mean(axis=0)
    centred = unit - mean
    return len(unit), mean, centred.T @ centred / len(unit)


def whiten(rows: Matrix, matrix: Matrix, mean: Matrix) -> Matrix:
    """Return `matrix (u - mean)`, `u = pi(row)`, of `(n, dim)` rows; zeros for bad ones."""
    bad = bad_rows(rows)[:, None]
    unit = project(np.where(bad, 0.0, rows))
    return np.where(bad, 0.0, (unit - mean) @ matrix.T)


def affine(rows: Matrix, matrix: Matrix, offset: Matrix) -> Matrix:
    """Return `matrix u + offset`, `u = pi(row)`, of `(n, dim)` rows; zeros for bad ones."""
    bad = bad_rows(rows)[:, None]
    unit = project(np.where(bad, 0.0, rows))
    return np.where(bad, 0.0, unit @ matrix.T + offset)


def philox(seed: int, counter: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Return the four words of 32 bits of Philox 4x32-10 with this key of 64 bits.

    The words of the counter are integers, or arrays of uint64 that broadcast.

    Source: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    word = 0xFFFFFFFF
    a, b, c, d = counter
    key = [seed & word, seed >> 32]
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ key[0], second & word, (first >> 32) ^ d ^ key[1], first & word
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return a, b, c, d


def normals(seed: int, numbers: Iterable[int], dim: int) -> Matrix:
    """Return `(n, dim)` Gaussian numbers, those of rows with these numbers `(n,)`, by Box and Muller."""
    rows = np.array([int(number) % 2**64 for number in numbers], np.uint64)[:, None]
    groups = np.arange(-(-dim // 4), dtype=np.uint64)
    words = philox(seed, (groups, rows & 0xFFFFFFFF, rows >> 32, 0))
    u = [((each >> 8) + 0.5) * 2.0**-24 for each in words]
    found = []
    for pair in (0, 2):
        radius, angle = np.sqrt(-2 * np.log(u[pair])), 2 * np.pi * u[pair + 1]
        found += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.concatenate(found, axis=1)[:, :dim]


def add_noise(rows: Matrix, std: float, seed: int, numbers: Iterable[int]) -> Matrix:
    """Return `pi(row + std n)` of `(n, dim)` rows, `n` being the `normals` of each; rows of zeros stay so."""
    noisy = project(rows + std * normals(seed, numbers, rows.shape[1]))
    return np.where((rows == 0).all(axis=1, keepdims=True), 0.0, noisy)
