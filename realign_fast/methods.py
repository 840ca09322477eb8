"""The maps by name: from the moments of both sets to the parameters of `pi(pi(scale u + shift) + correction)`.

Source: ReAlign, arXiv 2602.07026, section on Anchor, Trace and Centroid alignment; the refined centroid is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import _C
from .moments import Moments

if TYPE_CHECKING:
    from .kernels._maps import Maps

_EPS = 1e-10
# Below this the identity `trace = 1 - ||mean||**2` has lost its digits: the set is constant.
_MIN_TRACE = 1e-6

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Parameters:
    """`scale` (s), `shift` (c) and `correction` (b), vectors of `(dim,)` float64."""

    scale: float
    shift: Vector
    correction: Vector

    @cached_property
    def row_map(self) -> _C.RowMap:
        """As the C++ kernels take it."""
        return _C.RowMap(self.scale, self.shift, self.correction)

    @cached_property
    def alone(self) -> ParametersTable:
        """As a table of one."""
        return ParametersTable((self,))

    def __reduce__(self) -> tuple[Any, ...]:
        return Parameters, (self.scale, self.shift, self.correction)


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
        """Return them as tensors on a torch device, made once."""
        if device not in self._on_devices:
            from ._torch_rows import tensors_of

            table = (
                np.array([each.scale for each in self]),
                *(np.stack([getattr(each, name) for each in self]) for name in ("shift", "correction")),
            )
            self._on_devices[device] = tensors_of(table, device)
        return self._on_devices[device]


class Problem(Protocol):
    """What a solver may ask of the source rows; each call of `mean_of` is one read of them."""

    source: Moments
    target: Moments

    def mean_of(self, parameters: Parameters) -> Vector:
        """Return the mean of the mapped source rows."""

    def newton_step(self, parameters: Parameters, residual: Vector) -> Vector:
        """Return the change of the correction that removes `residual` from the mean, to first order."""


@dataclass
class Solution:
    """The parameters after each step, in order, and the centroid gap where a read of all rows has measured it."""

    steps: dict[str, Parameters] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)

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
        if moments.trace < _MIN_TRACE:
            raise ValueError(
                f"{name}: all rows are equal (trace {moments.trace:.1e}, expected at least {_MIN_TRACE:.0e})"
            )


def anchor(problem: Problem) -> Solution:
    """`pi(u - mu_y + mu_x)`: the mean shift."""
    shift = problem.target.mean - problem.source.mean
    return Solution({"anchor": Parameters(1.0, shift, np.zeros_like(shift))})


def anchor_trace(problem: Problem) -> Solution:
    """`pi(mu_x + s (u - mu_y))` with `s = sqrt(T_x / (T_y + eps))`."""
    solution = anchor(problem)
    scale = float(np.sqrt(problem.target.trace / (problem.source.trace + _EPS)))
    shift = problem.target.mean - scale * problem.source.mean
    solution.steps["trace"] = Parameters(scale, shift, np.zeros_like(shift))
    return solution


def realign(problem: Problem, refine: int = 0) -> Solution:
    """Anchor and trace, then the centroid: `b = mu_x - m'`, with `refine` Newton steps on what is left.

    Each step is one more read of the source; they end early where one no longer makes the gap smaller, which is then
    at the resolution of the moments.
    """
    if type(refine) is not int or refine < 0:
        raise ValueError(f"refine must be a whole number of at least 0, got {refine!r}")
    solution = anchor_trace(problem)
    target_mean = problem.target.mean
    name, parameters = "trace", solution.parameters
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


@dataclass(frozen=True)
class Method:
    """A solver, whether it reads the source again, and the names of its options."""

    solve: Callable[..., Solution]
    reads_again: bool
    options: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "anchor": Method(anchor, reads_again=False),
    "anchor_trace": Method(anchor_trace, reads_again=False),
    "realign": Method(realign, reads_again=True, options=("refine",)),
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
