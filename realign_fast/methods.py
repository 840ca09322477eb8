"""The maps by name: from the moments of both sets to the parameters of `pi(pi(scale u + shift) + correction)`.

Maps with a covariance have a matrix where the scale stands.

Source: ReAlign, arXiv 2602.07026, section on Anchor, Trace and Centroid alignment; the refined centroid is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ._native import _C
from ._spectral import (
    Shrinkage,
    Spectrum,
    shrinkage_of,
    spectrum,
    spectrum_of,
    transport_matrix,
    whitening_matrix,
)
from ._steps import Affine
from ._strength import MOST_ROWS, SHRINKAGES, choose
from .moments import Moments

if TYPE_CHECKING:
    from .kernels._maps import Maps

_EPS = 1e-10
# Below this the identity `trace = 1 - ||mean||**2` has lost its digits: the set is constant.
_MIN_TRACE = 1e-6

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Parameters:
    """`scale` (s), `shift` (c) and `correction` (b), vectors of `(dim,)` float64; or a matrix instead of the scale.

    Attributes
    ----------
    affine : Affine or None
        Of the maps with a matrix: `matrix u + offset`. Their `scale` is 1 and `shift` the offset.
    noise_std : float
        Of the noise that belongs to the map.
    """

    scale: float
    shift: Vector
    correction: Vector
    affine: Affine | None = None
    noise_std: float = 0.0

    @classmethod
    def with_matrix(cls, affine: Affine) -> Parameters:
        """Return `pi(matrix u + offset)`."""
        return cls(1.0, affine.offset, np.zeros_like(affine.offset), affine)

    @cached_property
    def row_map(self) -> _C.RowMap:
        """As the C++ kernels take it: of a map with a matrix, what comes after that."""
        shift = np.zeros_like(self.shift) if self.affine else self.shift
        return _C.RowMap(self.scale, shift, self.correction)

    @cached_property
    def alone(self) -> ParametersTable:
        """As a table of one."""
        return ParametersTable((self,))

    def __reduce__(self) -> tuple[Any, ...]:
        return Parameters, (self.scale, self.shift, self.correction, self.affine, self.noise_std)


@cache
def unit_length(dim: int) -> Parameters:
    """Return the map that only brings rows to unit length."""
    return Parameters(1.0, np.zeros(dim), np.zeros(dim))


class ParametersTable(tuple[Parameters, ...]):
    """Parameters of one dimension with a number each: rows of many domains are mapped in one pass."""

    @cached_property
    def row_maps(self) -> list[_C.RowMap]:
        """As the C++ kernels take them."""
        return [each.row_map for each in self]

    @cached_property
    def _on_devices(self) -> dict[Any, Maps]:
        return {}

    def on(self, device: Any) -> Maps:
        """Return them as tensors on a torch device, made once: of maps with a matrix, what comes after that."""
        if device not in self._on_devices:
            from ._torch_rows import tensors_of

            table = (
                np.array([each.scale for each in self]),
                np.stack([np.zeros_like(each.shift) if each.affine else each.shift for each in self]),
                np.stack([each.correction for each in self]),
            )
            self._on_devices[device] = tensors_of(table, device)
        return self._on_devices[device]


class Problem(Protocol):
    """What a solver may ask of the source rows; each call of `mean_of` is one read of them."""

    source: Moments
    target: Moments
    names: tuple[str, str]

    def mean_of(self, parameters: Parameters) -> Vector:
        """Return the mean of the mapped source rows."""

    def newton_step(self, parameters: Parameters, residual: Vector) -> Vector:
        """Return the change of the correction that removes `residual` from the mean, to first order."""

    def samples(self, num_rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return at most so many unit rows of each set, `(n, dim)` and `(m, dim)`, in a pseudo-random order.

        ValueError where there are none.
        """


@dataclass
class Solution:
    """The parameters after each step, in order, and the centroid gap where a read of all rows has measured it.

    Attributes
    ----------
    target : Parameters or None
        What becomes of target rows, where that is more than unit length.
    chosen : dict
        Options that the solver has chosen itself.
    selection : dict
        What it chose them from.
    """

    steps: dict[str, Parameters] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)
    target: Parameters | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> Parameters:
        """Those of the whole map."""
        return next(reversed(self.steps.values()))


def check_sets(source: Moments, target: Moments, names: tuple[str, str] = ("text", "image")) -> None:
    """Raise ValueError where a set has fewer than 2 rows, is constant, or the dimensions differ."""
    if source.dim != target.dim:
        raise ValueError(f"{names[0]} has dimension {source.dim}, {names[1]} has dimension {target.dim}")
    for name, moments in zip(names, (source, target), strict=True):
        if moments.count - moments.num_zero < 2:
            raise ValueError(
                f"{name} has {moments.count - moments.num_zero} usable rows, a fit needs at least 2 on each side"
            )
        check_spread(moments, name)


def check_spread(moments: Moments, name: str) -> None:
    """Raise ValueError where all rows are equal."""
    if moments.trace < _MIN_TRACE:
        raise ValueError(f"{name}: all rows are equal (trace {moments.trace:.1e}, expected at least {_MIN_TRACE:.0e})")


def anchor(problem: Problem) -> Solution:
    """`pi(u - mu_y + mu_x)`: the mean shift."""
    shift = problem.target.mean - problem.source.mean
    return Solution({"anchor": Parameters(1.0, shift, np.zeros_like(shift))})


def _trace_scale(problem: Problem) -> float:
    return float(np.sqrt(problem.target.trace / (problem.source.trace + _EPS)))


def anchor_trace(problem: Problem) -> Solution:
    """`pi(mu_x + s (u - mu_y))` with `s = sqrt(T_x / (T_y + eps))`."""
    solution = anchor(problem)
    scale = _trace_scale(problem)
    shift = problem.target.mean - scale * problem.source.mean
    solution.steps["trace"] = Parameters(scale, shift, np.zeros_like(shift))
    return solution


def check_count(name: str, value: object, least: int = 0) -> None:
    """Raise ValueError unless `value` is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _correct(problem: Problem, solution: Solution, refine: int) -> Solution:
    """Add the centroid step: `b = mu_x - m'`, with `refine` Newton steps on what is left.

    Each step is one more read of the source; they end early where one no longer makes the gap smaller, which is then
    at the resolution of the moments.
    """
    check_count("refine", refine)
    target_mean = problem.target.mean
    name, parameters = list(solution.steps.items())[-1]
    residual = target_mean - problem.mean_of(parameters)
    solution.gaps[name] = float(np.linalg.norm(residual))
    change = residual
    for step in range(refine + 1):
        previous = name
        name = f"refine_{step}" if step else "centroid"
        parameters = replace(parameters, correction=parameters.correction + change)
        solution.steps[name] = parameters
        if step == refine:
            break
        residual = target_mean - problem.mean_of(parameters)
        solution.gaps[name] = float(np.linalg.norm(residual))
        if step and solution.gaps[name] >= solution.gaps[previous]:
            del solution.steps[name]
            break
        change = problem.newton_step(parameters, residual)
    return solution


def realign(problem: Problem, refine: int = 0) -> Solution:
    """Anchor and trace, then the centroid, `refine` times more."""
    return _correct(problem, anchor_trace(problem), refine)


def c3(problem: Problem, sigma: float = 0.016) -> Solution:
    """`pi(pi(u - mu_y + mu_x) + sigma n)`: the mean shift, and Gaussian noise for each row.

    Source: C3, Connect, Collapse, Corrupt (arXiv 2401.08567).
    """
    if not (np.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be finite and at least 0, got {sigma}")
    solution = anchor(problem)
    solution.steps["noise"] = replace(solution.parameters, noise_std=float(sigma))
    return solution


def center(problem: Problem) -> Solution:
    """`pi(u - mu)`, each side by its own mean: for search in mixed collections, where a constant added hurts."""
    source, target = (
        Parameters(1.0, -moments.mean, np.zeros(moments.dim)) for moments in (problem.source, problem.target)
    )
    return Solution({"center": source}, target=target)


def _spectra(problem: Problem, shrinkage: Shrinkage) -> tuple[Spectrum, Spectrum]:
    return (
        spectrum_of(problem.source, shrinkage, problem.names[0]),
        spectrum_of(problem.target, shrinkage, problem.names[1]),
    )


def _between(problem: Problem, matrix: Matrix) -> Parameters:
    """Return `pi(matrix (u - mu_y) + mu_x)`."""
    return Parameters.with_matrix(Affine.about(problem.source.mean, matrix, problem.target.mean))


def whiten(problem: Problem, kind: str = "zca", shrinkage: Shrinkage = "ledoit_wolf") -> Solution:
    """`pi(W (u - mu))`, each side by its own mean and covariance."""
    source, target = (
        Parameters.with_matrix(Affine.about(moments.mean, whitening_matrix(of, kind), np.zeros(moments.dim)))
        for moments, of in zip((problem.source, problem.target), _spectra(problem, shrinkage), strict=True)
    )
    return Solution({"whiten": source}, target=target)


def coral(problem: Problem, shrinkage: Shrinkage = 1e-4, refine: int = 0) -> Solution:
    """Whiten the source, colour it as the target: `Sigma_x^(1/2) Sigma_y^(-1/2)`, then the centroid.

    Source: Sun, Feng and Saenko, Return of frustratingly easy domain adaptation, 2016.
    """
    source, target = _spectra(problem, shrinkage)
    matrix = target.power(0.5) @ source.power(-0.5)
    return _correct(problem, Solution({"colour": _between(problem, matrix)}), refine)


def bca(problem: Problem, shrinkage: Shrinkage = 1e-4, energy: float = 0.95, refine: int = 0) -> Solution:
    """Do the same in two blocks: the principal directions of `Sigma_x + Sigma_y` that hold `energy`, and the rest."""
    source, target = _spectra(problem, shrinkage)
    source.check_rank(problem.source.dim)
    covariances = [of.power(1) for of in (source, target)]
    both = spectrum(sum(covariances[1:], covariances[0]), "both")
    rank = both.num_holding(energy)
    matrix = np.zeros_like(covariances[0])
    for block in (both.vectors[:, ::-1][:, :rank], both.vectors[:, ::-1][:, rank:]):
        if block.shape[1]:
            within = [
                spectrum(block.T @ covariance @ block, name)
                for covariance, name in zip(covariances, problem.names, strict=True)
            ]
            matrix += block @ within[1].power(0.5) @ within[0].power(-0.5) @ block.T
    return _correct(problem, Solution({"colour": _between(problem, matrix)}), refine)


def ot(problem: Problem, shrinkage: Shrinkage = "auto", strength: float | str = "auto", refine: int = 0) -> Solution:
    """Gaussian optimal transport, as far as `strength` goes from the trace scale, then the centroid.

    A strength of "auto" is chosen from rows of both sets, and the shrinkage with it where that is "auto" too, see
    `_strength`; beside a number, a shrinkage of "auto" is one half: a ridge of the mean variance.
    """
    if isinstance(strength, bool) or (isinstance(strength, str) and strength != "auto"):
        raise ValueError(f'strength must be "auto" or a number in [0, 1], got {strength!r}')
    if not isinstance(strength, str) and not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
    chosen: dict[str, Any] = {}
    selection: dict[str, Any] = {}
    if strength == "auto":
        shrinkages = SHRINKAGES
        if shrinkage != "auto":
            shrinkages = (shrinkage_of(problem.source, shrinkage),)
        choice = choose(*problem.samples(MOST_ROWS), shrinkages)
        strength = choice.strength
        shrinkage = choice.shrinkage if shrinkage == "auto" else shrinkage
        chosen, selection = {"strength": strength, "shrinkage": shrinkage}, choice.as_dict()
    elif shrinkage == "auto":
        shrinkage = 0.5
    weight = float(strength)
    matrix = (1 - weight) * _trace_scale(problem) * np.eye(problem.source.dim)
    if weight:
        matrix += weight * transport_matrix(*_spectra(problem, shrinkage))
    solution = Solution({"transport": _between(problem, matrix)}, chosen=chosen, selection=selection)
    return _correct(problem, solution, refine)


def debias(problem: Problem, k: int = 1, refine: int = 0) -> Solution:
    """Leave out the `k` directions in which the source varies most, then the centroid.

    `pi((I - V V^T) (u - mu_y) + mu_x)`, V being these directions.
    """
    check_count("k", k, least=1)
    if k >= problem.source.dim:
        raise ValueError(f"k must be less than the dimension {problem.source.dim}, got {k}")
    directions = spectrum_of(problem.source, None, problem.names[0]).vectors[:, -k:]
    matrix = np.eye(problem.source.dim) - directions @ directions.T
    return _correct(problem, Solution({"debias": _between(problem, matrix)}), refine)


@dataclass(frozen=True)
class Method:
    """A solver, and what it asks for.

    Attributes
    ----------
    reads_again : bool
        The source rows, once their moments are known.
    covariances : bool
        In the moments of both sets.
    options : tuple of str
        Names.
    """

    solve: Callable[..., Solution]
    reads_again: bool = False
    covariances: bool = False
    options: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "anchor": Method(anchor),
    "anchor_trace": Method(anchor_trace),
    "realign": Method(realign, reads_again=True, options=("refine",)),
    "c3": Method(c3, options=("sigma",)),
    "center": Method(center),
    "whiten": Method(whiten, covariances=True, options=("kind", "shrinkage")),
    "coral": Method(coral, reads_again=True, covariances=True, options=("shrinkage", "refine")),
    "bca": Method(bca, reads_again=True, covariances=True, options=("shrinkage", "energy", "refine")),
    "ot": Method(ot, reads_again=True, covariances=True, options=("shrinkage", "strength", "refine")),
    "debias": Method(debias, reads_again=True, covariances=True, options=("k", "refine")),
}


def get_method(name: str, options: dict[str, object]) -> Method:
    """Return the method called `name`. ValueError for a name or an option that there is not."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    for option in options:
        if option not in method.options:
            raise ValueError(f"method {name!r} takes no option {option!r}")
    return method
