"""Whitening of one set of embeddings: uncorrelated directions of unit variance.

Source: Kessy, Lewin and Strimmer, Optimal whitening and decorrelation, 2018, for the three kinds.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _files
from ._dtypes import to_float64
from ._rows import as_rows, is_tensor
from ._spectral import KINDS, Shrinkage, check_shrinkage, spectrum_of, whitening_matrix
from ._steps import Affine, frozen
from ._transform import Steps, transform_by
from .alignment import gather_moments
from .methods import check_count, check_spread
from .moments import Moments, OnBadRows

Kind = Literal["zca", "pca", "cholesky"]


@dataclass(frozen=True, eq=False)
class Whitener:
    """`W (u - mean)` of unit rows `u = pi(row)`: what it was fitted on has the identity as covariance afterwards.

    Made by `fit`, `from_moments` or `load`; nothing in it changes afterwards. With shrinkage, it is the shrunken
    covariance that becomes the identity.

    Attributes
    ----------
    kind : str
        "zca": symmetric, of all whitenings the nearest to the rows themselves. "pca": along the principal directions,
        that of the largest variance first. "cholesky": triangular.
    mean : ndarray
        `(dim,)` float64.
    matrix : ndarray
        W, `(num_components, dim)` float64.
    inverse_matrix : ndarray
        `(dim, num_components)` float64: the inverse of W, or its pseudo-inverse where it has fewer rows.
    shrinkage : float
        The weight of the identity in the covariance.
    count : int
        Rows it was fitted on.
    """

    kind: str
    mean: NDArray[np.float64]
    matrix: NDArray[np.float64]
    inverse_matrix: NDArray[np.float64]
    shrinkage: float
    count: int

    @classmethod
    def fit(
        cls,
        x: Any,
        kind: Kind = "zca",
        shrinkage: Shrinkage = None,
        n_components: int | None = None,
        *,
        on_bad_rows: OnBadRows = "raise",
        backend: str = "auto",
        num_threads: int | None = None,
        key: str | None = None,
        column: str | None = None,
        limit: int | None = None,
        progress: bool = False,
    ) -> Whitener:
        """Fit on a set of rows, read once; parameters that are not explained here are those of `realign_fast.fit`.

        Parameters
        ----------
        x
            In any of the forms of `realign_fast.fit`: array, tensor, paths, batches.
        kind
            "zca", "pca" or "cholesky".
        shrinkage
            The weight of the identity in the covariance: None, a number in [0, 1], "ledoit_wolf" or "oas".
        n_components
            Keep so many principal directions: rows of `(..., n_components)` for "pca", rows of `(..., dim)` without
            the other directions for "zca"; not for "cholesky".

        Raises
        ------
        ValueError
            If the covariance has too low a rank and there is no shrinkage, or an argument is out of range, and as
            `fit`.
        """
        _check_options(kind, shrinkage, n_components)
        moments = gather_moments(
            x,
            name="x",
            on_bad_rows=on_bad_rows,
            backend=backend,
            num_threads=num_threads,
            key=key,
            column=column,
            limit=limit,
            progress=progress,
            covariance=True,
        )
        return cls.from_moments(moments, kind, shrinkage, n_components)

    @classmethod
    def from_moments(
        cls,
        moments: Moments,
        kind: Kind = "zca",
        shrinkage: Shrinkage = None,
        n_components: int | None = None,
    ) -> Whitener:
        """Fit on statistics gathered elsewhere, with `Moments(dim, covariance=True)`; else as `fit`."""
        _check_options(kind, shrinkage, n_components)
        if n_components is not None and n_components > moments.dim:
            raise ValueError(f"n_components must be at most the dimension {moments.dim}, got {n_components}")
        mean = moments.mean
        check_spread(moments, "x")
        of = spectrum_of(moments, shrinkage, "x")
        matrix = whitening_matrix(of, kind, n_components)
        inverse = of.power(1) @ matrix.T  # W Sigma W^T is the identity, or a projection
        return cls(kind, frozen(mean), frozen(matrix), frozen(inverse), of.shrinkage, moments.count)

    @property
    def dim(self) -> int:
        """Dimension of the rows."""
        return self.mean.size

    @cached_property
    def _affine(self) -> Affine:
        return Affine.about(self.mean, self.matrix, np.zeros(len(self.matrix)))

    def __repr__(self) -> str:
        return f"Whitener(kind={self.kind!r}, dim={self.dim}, out_dim={len(self.matrix)}, count={self.count})"

    def transform(
        self,
        x: Any,
        out: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
        num_threads: int | None = None,
        on_bad_rows: Literal["raise", "zero"] = "raise",
    ) -> Any:
        """Whiten rows `(..., dim)`, after bringing them to unit length; arguments and errors as `Alignment.transform`.

        float64 results are computed in float64, others in float32 (on a GPU, rows of 16 bits as they are).
        """
        steps = Steps(self._affine, None)
        return transform_by(steps, x, out, dtype, backend=backend, num_threads=num_threads, on_bad_rows=on_bad_rows)

    def inverse_transform(self, x: Any) -> Any:
        """Return the unit rows that `transform` takes to `x` `(..., out_dim)`, in its dtype and on its device.

        Where there are fewer components than dimensions, what was left out is that of the mean.
        """
        if is_tensor(x):
            torch = sys.modules["torch"]
            if x.ndim == 0 or x.shape[-1] != len(self.matrix):
                raise ValueError(f"x must have rows of dimension {len(self.matrix)}, got shape {tuple(x.shape)}")
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            step = tuple(torch.tensor(each, dtype=wide, device=x.device) for each in (self.inverse_matrix, self.mean))
            return torch.nn.functional.linear(x.to(wide), *step).to(x.dtype)
        rows = as_rows(x, dim=len(self.matrix))
        units = to_float64(rows) @ self.inverse_matrix.T + self.mean
        return units.reshape(*x.shape[:-1], self.dim).astype(x.dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file of float64, whole or not at all."""
        tensors = {"mean": self.mean, "matrix": self.matrix, "inverse_matrix": self.inverse_matrix}
        fields = {"whitening": self.kind, "shrinkage": self.shrinkage, "count": self.count}
        _files.save(path, "whitener", tensors, fields, version=2)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Whitener:
        """Read what `save` wrote.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it is damaged, holds something else, or comes from a newer format.
        """
        matrix = (np.dtype(np.float64), 2)
        shapes = {"mean": (np.dtype(np.float64), 1), "matrix": matrix, "inverse_matrix": matrix}
        tensors, fields = _files.load(path, "whitener", shapes)
        out_dim, dim = tensors["matrix"].shape
        if not 0 < out_dim <= dim or tensors["inverse_matrix"].shape != (dim, out_dim) or tensors["mean"].size != dim:
            raise ValueError(f"{path}: mean, matrix and inverse_matrix do not fit together")
        kind, shrinkage, count = (fields.get(name) for name in ("whitening", "shrinkage", "count"))
        if kind not in KINDS or type(count) is not int or not isinstance(shrinkage, int | float):
            raise ValueError(f"{path}: its header is damaged: {kind!r}, {shrinkage!r}, {count!r}")
        mean, whitening, inverse = (frozen(tensors[name]) for name in ("mean", "matrix", "inverse_matrix"))
        return cls(kind, mean, whitening, inverse, float(shrinkage), count)


def _check_options(kind: str, shrinkage: Shrinkage, n_components: int | None) -> None:
    check_shrinkage(shrinkage)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if n_components is None:
        return
    check_count("n_components", n_components, least=1)
    if kind == "cholesky":
        raise ValueError("n_components chooses principal directions, which kind 'cholesky' does not have: use 'pca'")
