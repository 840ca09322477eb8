"""The modality gap in a fixed frame: biases, residuals, and the drift that the projection to unit length brings.

All over unit rows, in float64. `y` is a row of text, `x` its image.

Source: ReAlign (arXiv 2602.07026), fixed-frame theory of the modality gap; AnisoAlign (arXiv 2605.07825) for the
anisotropy of the paired residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import reference
from .._spectral import Spectrum, spectrum, with_signs
from ..moments import Moments
from ._rows import covariance_of, unit_pairs, unit_rows
from .spectra import anisotropy, effective_dimension

__all__ = [
    "Components",
    "Decomposition",
    "Frame",
    "PhantomDrift",
    "Plane",
    "components",
    "decompose",
    "frame_of",
    "largest_angle",
    "phantom_drift",
    "principal_plane",
    "project",
]

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

# Squared lengths and traces of unit rows below this are rounding: they have no direction and no shape.
_NOTHING = 1e-10


@dataclass(frozen=True, eq=False)
class Frame:
    """The principal directions of `Sigma = Cov(x) + Cov(y)` that hold some share of its trace.

    Attributes
    ----------
    basis : ndarray
        U, `(dim, rank)`: orthonormal columns, that of largest variance first, the largest element of each positive.
    values : ndarray
        `(dim,)`, all eigenvalues of Sigma, largest first.
    """

    basis: Matrix
    values: Vector

    @property
    def rank(self) -> int:
        """How many directions it has."""
        return int(self.basis.shape[1])

    @property
    def energy(self) -> float:
        """The share of the trace that they hold, at least what was asked for."""
        return float(self.values[: self.rank].sum() / self.values.sum())

    @classmethod
    def of_moments(cls, text: Moments, image: Moments, energy: float = 0.95) -> Frame:
        """Return the frame that holds `energy` of the trace, from moments with covariance of `text` and of `image`.

        Raises
        ------
        ValueError
            If the dimensions differ, no covariance was collected, `energy` is not in (0, 1], or both sets are constant.
        """
        if text.dim != image.dim:
            raise ValueError(f"text has dimension {text.dim}, image has dimension {image.dim}")
        return cls._of_covariance(text.covariance + image.covariance, energy)

    @classmethod
    def _of_covariance(cls, covariance: Matrix, energy: float) -> Frame:
        if np.trace(covariance) < _NOTHING:
            raise ValueError("text and image: all rows of each are equal, which leaves no directions for a frame")
        of = spectrum(covariance, "text and image")
        rank = of.num_holding(energy)
        return cls(with_signs(of.vectors[:, ::-1][:, :rank]), of.values[::-1].copy())

    def split(self, vectors: Matrix) -> tuple[Matrix, Matrix]:
        """Return the parts of `vectors` `(..., dim)` in the span of the frame, `P_U v`, and across it, `P_V v`."""
        if self.rank == len(self.basis):
            return vectors, np.zeros_like(vectors)
        along = vectors @ self.basis @ self.basis.T
        return along, vectors - along


def frame_of(text: object, image: object, energy: float = 0.95) -> Frame:
    """Return the frame of `text` `(n, dim)` and `image` `(m, dim)` that holds `energy` of the trace; no pairs needed.

    Raises
    ------
    ValueError
        If the dimensions differ, a row is bad, `energy` is not in (0, 1], or all rows of each set are equal.
    """
    ours = unit_rows(text, "text")
    theirs = unit_rows(image, "image", dim=ours.shape[1])
    return Frame._of_covariance(covariance_of(ours) + covariance_of(theirs), energy)


def largest_angle(a: Frame, b: Frame) -> float:
    """Return the largest principal angle between frames `a` and `b`, in degrees; of two ranks, from the smaller one.

    By its sine and its cosine, so that neither small nor right angles lose digits (Knyazev and Argentati, 2002).
    ValueError where the dimensions differ.
    """
    if len(a.basis) != len(b.basis):
        raise ValueError(f"frames of dimension {len(a.basis)} and {len(b.basis)} have no angle between them")
    larger, smaller = (a.basis, b.basis) if a.rank >= b.rank else (b.basis, a.basis)
    common = larger.T @ smaller
    sine = np.linalg.norm(smaller - larger @ common, 2)
    cosine = np.linalg.svd(common, compute_uv=False)[-1]
    return float(np.degrees(np.arctan2(sine, cosine)))


class Components(NamedTuple):
    """The gap of each pair, `x - y = beta + gamma + delta + zeta`.

    Attributes
    ----------
    beta, gamma : ndarray
        `(dim,)`, the mean gap along the frame (principal mean bias) and across it (constant orthogonal bias).
    delta, zeta : ndarray
        `(n, dim)`, what is left of each pair's gap, along the frame and across it.
    """

    beta: Vector
    gamma: Vector
    delta: Matrix
    zeta: Matrix


def components(text: object, image: object, frame: Frame) -> Components:
    """Return the parts of the gap of pairs, `text` and `image` `(n, dim)`, in a `frame`; raises as `decompose` does."""
    _, gaps = _paired_gaps(text, image, frame)
    mean = gaps.mean(axis=0)
    return Components(*frame.split(mean), *frame.split(gaps - mean))


@dataclass(frozen=True)
class Decomposition:
    """What a frame says about the gap `x - y` of pairs, its mean being `beta + gamma`, the rest `delta + zeta`.

    None stands where there is nothing to look at: a squared length or a trace below 1e-10, so that the frame spans the
    whole space, or the part is constant.

    Attributes
    ----------
    num_rows : int
        How many pairs.
    gap_norm, beta_norm, gamma_norm : float
        Of the mean gap, the principal mean bias and the constant orthogonal bias.
    delta_trace, zeta_trace : float
        Of the covariances of the residuals along the frame and across it.
    delta_condition, zeta_condition : float or None
        Their largest eigenvalue over the smallest that is above 1e-6 of it.
    gamma_angle_deg : float or None
        Between gamma and the first principal direction of Cov(zeta), 0 to 90 degrees.
    anisotropy, effective_dimension : float or None
        A_r and d_eff of the paired residual `delta + zeta`, see `spectra`.
    mean_cosine : float
        Phi: the mean of `x . y`.
    """

    num_rows: int
    gap_norm: float
    beta_norm: float
    gamma_norm: float
    delta_trace: float
    zeta_trace: float
    delta_condition: float | None
    zeta_condition: float | None
    gamma_angle_deg: float | None
    anisotropy: float | None
    effective_dimension: float | None
    mean_cosine: float


def decompose(text: object, image: object, frame: Frame) -> Decomposition:
    """Return the biases and residuals of pairs `(n, dim)`, row i of `text` with row i of `image`, in a `frame`.

    Raises
    ------
    ValueError
        If the sets differ in length or in dimension, from each other or from the frame, or a row is bad.
    """
    mean_cosine, gaps = _paired_gaps(text, image, frame)
    mean = gaps.mean(axis=0)
    beta, gamma = frame.split(mean)
    covariance = covariance_of(gaps)
    delta = spectrum(frame.basis.T @ covariance @ frame.basis, "delta")
    zeta = spectrum(frame.split(frame.split(covariance)[1].T)[1], "zeta")
    residual = spectrum(covariance, "delta + zeta").values
    constant = residual.sum() < _NOTHING
    return Decomposition(
        num_rows=len(gaps),
        gap_norm=_norm(mean),
        beta_norm=_norm(beta),
        gamma_norm=_norm(gamma),
        delta_trace=float(delta.values.sum()),
        zeta_trace=float(zeta.values.sum()),
        delta_condition=_condition(delta),
        zeta_condition=_condition(zeta),
        gamma_angle_deg=_angle(gamma, zeta),
        anisotropy=None if constant else anisotropy(residual),
        effective_dimension=None if constant else effective_dimension(residual),
        mean_cosine=mean_cosine,
    )


def _paired_gaps(text: object, image: object, frame: Frame) -> tuple[float, Matrix]:
    ours, theirs = unit_pairs(text, image)
    if ours.shape[1] != len(frame.basis):
        raise ValueError(f"frame has dimension {len(frame.basis)}, text and image have dimension {ours.shape[1]}")
    return float(np.einsum("ij,ij->i", ours, theirs).mean()), theirs - ours


def _condition(of: Spectrum) -> float | None:
    return None if of.values.sum() < _NOTHING else float(of.values[-1] / of.values[-of.rank])


def _angle(vector: Vector, of: Spectrum) -> float | None:
    if vector @ vector < _NOTHING or of.values.sum() < _NOTHING:
        return None
    first = of.vectors[:, -1]
    along = first @ vector
    return float(np.degrees(np.arctan2(_norm(vector - along * first), abs(along))))


def _norm(vector: Vector) -> float:
    return float(np.linalg.norm(vector))


@dataclass(frozen=True, eq=False)
class PhantomDrift:
    """How far the projection to unit length moves the mean of mapped rows, `m' - mean(e2)`, as `(dim,)` vectors.

    Attributes
    ----------
    measured_vector : ndarray
        Over all rows.
    predicted_vector : ndarray
        By `-Sigma mu - E[e (||e||^2 - tr Sigma)] / 2 + 3/8 E[w^2] mu - E[w] / 2 mu`, where `mu`, `Sigma` and `e` are
        the mean of `e2`, its covariance and what departs from the mean, and `w = ||e2||^2 - 1`. The last term is 0
        where the map has the trace scale.
    paper_vector : ndarray
        By the second-order formula of the paper, with `r = ||mu||` and `a = mu / r`: m' departs from `a` by
        `(-Sigma a - a tr(Sigma) / 2 + 3/2 a (a^T Sigma a)) / r^2`, to which `a - mu` is added here. It holds for `e`
        small against `r`, which that of embeddings is not.
    """

    measured_vector: Vector
    predicted_vector: Vector
    paper_vector: Vector

    @property
    def measured(self) -> float:
        """Norm of the measured drift."""
        return _norm(self.measured_vector)

    @property
    def predicted(self) -> float:
        """Norm of the predicted one."""
        return _norm(self.predicted_vector)

    @property
    def paper(self) -> float:
        """Norm of the one that the paper's formula gives."""
        return _norm(self.paper_vector)


def phantom_drift(text: object, scale: float, shift: ArrayLike) -> PhantomDrift:
    """Return the drift of `pi(e2)`, `e2 = scale u + shift`, for the unit rows `u` of `text` `(n, dim)`.

    `scale` and `shift` `(dim,)` are those of an alignment without a matrix. Its correction is not applied: it is what
    removes this drift.

    Raises
    ------
    ValueError
        If a row is bad, `scale` or `shift` is not finite or of another shape, or the map takes the mean to the origin.
    """
    rows = unit_rows(text, "text")
    offset = np.asarray(shift, np.float64)
    if offset.shape != rows.shape[1:]:
        raise ValueError(f"shift must have shape ({rows.shape[1]},), got {offset.shape}")
    if not (np.isfinite(scale) and np.isfinite(offset).all()):
        raise ValueError("scale and shift must be finite")
    mapped = scale * rows + offset
    mean = mapped.mean(axis=0)
    radius = _norm(mean)
    if radius**2 < _NOTHING:
        raise ValueError("scale and shift take the mean of text to the origin, from where there is no drift")
    departures = mapped - mean
    squares = np.square(departures).sum(axis=1)
    trace = squares.mean()
    excess = np.square(mapped).sum(axis=1) - 1
    spread = departures.T @ (departures @ mean) / len(rows)  # Sigma mu
    skew = departures.T @ (squares - trace) / len(rows)
    axis = mean / radius
    return PhantomDrift(
        measured_vector=reference.project(mapped).mean(axis=0) - mean,
        predicted_vector=-spread - skew / 2 + (3 / 8 * np.square(excess).mean() - excess.mean() / 2) * mean,
        paper_vector=axis
        - mean
        + (-spread / radius + (3 / 2 * (axis @ spread) / radius - trace / 2) * axis) / radius**2,
    )


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane to draw rows in.

    Attributes
    ----------
    centre : ndarray
        `(dim,)`, what lies at the origin of the picture.
    directions : ndarray
        `(dim, 2)`, orthonormal columns, the largest element of each positive.
    shares : tuple of float
        Of the variance, along each direction.
    """

    centre: Vector
    directions: Matrix
    shares: tuple[float, float]


def principal_plane(text: object, image: object) -> Plane:
    """Return the plane of largest variance of unit rows, `text` `(n, dim)` and `image` `(m, dim)` taken as one set.

    Each row counts the same, so that a larger set has more to say.

    Raises
    ------
    ValueError
        If the dimensions differ or are less than 2, a row is bad, or all rows of both sets are equal.
    """
    ours = unit_rows(text, "text")
    theirs = unit_rows(image, "image", dim=ours.shape[1])
    if ours.shape[1] < 2:
        raise ValueError(f"a plane needs rows of dimension 2 or more, got {ours.shape[1]}")
    both = np.concatenate([ours, theirs])
    of = spectrum(covariance_of(both), "text and image")
    trace = of.values.sum()
    if trace < _NOTHING:
        raise ValueError("text and image: all rows are equal, which leaves no directions for a plane")
    directions = with_signs(of.vectors[:, :-3:-1])
    return Plane(both.mean(axis=0), directions, (float(of.values[-1] / trace), float(of.values[-2] / trace)))


def project(rows: object, plane: Plane) -> Matrix:
    """Return where the unit rows of `rows` `(n, dim)` lie in a `plane`, `(n, 2)`; raises for rows that are bad."""
    projected: Matrix = (unit_rows(rows, "rows", dim=len(plane.centre)) - plane.centre) @ plane.directions
    return projected
