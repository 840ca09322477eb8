"""Rows as the diagnostics see them: in float64, of length one, none of them bad."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import reference
from .._dtypes import to_float64
from .._rows import as_rows

Matrix = NDArray[np.float64]


def unit_rows(rows: Any, name: str, *, dim: int | None = None, least: int = 1) -> Matrix:
    """Return the rows of an array or tensor `(n, dim)`, each divided by its length.

    Raises
    ------
    TypeError
        If `rows` is no array or tensor of a dtype that rows may have.
    ValueError
        If the rows have another shape or dimension, there are fewer than `least`, or some are bad: they hold NaN or
        infinity or have norm zero.
    """
    if np.ndim(rows) != 2:
        raise ValueError(f"{name} must have shape (n, dim), got {np.shape(rows)}")
    values = to_float64(as_rows(rows, name=name, dim=dim))
    if len(values) < least:
        raise ValueError(f"{name} must have at least {least} row{'s'[: least > 1]}, got {len(values)}")
    bad = reference.bad_rows(values)
    if bad.any():
        raise ValueError(
            f"{name}: row {int(bad.argmax())} holds NaN or infinity or has norm zero, as do {int(bad.sum())} of "
            f"{len(values)} rows in all; leave them out"
        )
    return reference.project(values)


def unit_pairs(text: object, image: object) -> tuple[Matrix, Matrix]:
    """Return the unit rows of both sets, row i of one belonging to row i of the other.

    ValueError where the sets differ in length, besides what `unit_rows` raises.
    """
    ours = unit_rows(text, "text")
    theirs = unit_rows(image, "image", dim=ours.shape[1])
    if len(ours) != len(theirs):
        raise ValueError(
            f"text has {len(ours)} rows and image {len(theirs)}: pairs are needed, row i of text with row i of image"
        )
    return ours, theirs


def covariance_of(unit: Matrix) -> Matrix:
    """Return the covariance (ddof 0) of rows `(n, dim)`."""
    centred = unit - unit.mean(axis=0)
    covariance: Matrix = centred.T @ centred / len(unit)
    return covariance
