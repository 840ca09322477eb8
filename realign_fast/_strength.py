"""How far to go with optimal transport, chosen from unpaired rows.

A full covariance estimated from few rows carries neighbourhoods away at random; a scale alone leaves the shapes of the
two clouds apart. The choice is made in three steps, on four folds of the rows of each side:

1. Is there anything to transport? The squared difference of the covariances, after scaling, over the target's own,
   with its noise taken out by multiplying only estimates from different folds. Both are looked at across the two means,
   along which rows of length one vary less whatever their cloud. Less than 0.02 or five standard errors: strength 0.
2. Is the map well determined? The share of its departure from a scale that maps fitted on different folds agree on,
   for the rows of all folds. From 0.85 on, the candidates are the strengths from 0.9 on: what happens to neighbourhoods
   is then the data's doing. Below, they are those that keep 0.8 of the held-out rows' nearest neighbours.
3. Of the candidates, the one whose held-out source rows come nearest to held-out target rows, in energy distance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._nearest import neighbours, overlap
from ._spectral import spectrum, transport_matrix
from .moments import Moments

Matrix = NDArray[np.float64]

NUM_FOLDS = 4
SHRINKAGES: tuple[float, ...] = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9)
STRENGTHS = tuple(step / 10 for step in range(11))
LEAST_ROWS = 10 * NUM_FOLDS
MOST_ROWS = 40_000  # 50 rows a dimension at 768; more would only cost time

_LEAST_DIFFERENCE = 0.02
_STANDARD_ERRORS = 5
_DETERMINED = 0.85
_LEAST_OVERLAP = 0.8
_HELD_OUT_ROWS = 1000  # of a fold, for distances and neighbours
_NEIGHBOURS = 10


@dataclass
class Choice:
    """What was chosen, and from what.

    Attributes
    ----------
    shrinkage, strength : float
    difference, difference_error : float
        Of the covariances, see above, and its standard error.
    reliability : float or None
        Of the map; None where there was nothing to transport.
    candidates : list of dict
        `shrinkage`, `strength`, `distance`, its standard error over folds `distance_error`, `overlap`, for each.
    """

    shrinkage: float
    strength: float
    difference: float
    difference_error: float
    reliability: float | None = None
    candidates: list[dict[str, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return dict(vars(self))


def choose(source: NDArray[Any], target: NDArray[Any], shrinkages: tuple[float, ...] = SHRINKAGES) -> Choice:
    """Choose shrinkage and strength, given unit rows `(n, dim)` and `(m, dim)` in a random order.

    Raises
    ------
    ValueError
        If a side has fewer than 40 rows.
    """
    for name, rows in (("source", source), ("target", target)):
        if len(rows) < LEAST_ROWS:
            raise ValueError(f"strength='auto' needs at least {LEAST_ROWS} rows a side, {name} has {len(rows)}")
    ours, theirs = _Side(source, "text"), _Side(target, "image")
    difference, error = _difference(ours, theirs)
    candidates = _candidates(ours, theirs, shrinkages)
    nearest = min(candidates, key=lambda each: each["distance"])
    if difference < max(_LEAST_DIFFERENCE, _STANDARD_ERRORS * error):
        return Choice(nearest["shrinkage"], 0.0, difference, error, None, candidates)
    reliability = _reliability(ours, theirs, nearest["shrinkage"])
    if reliability >= _DETERMINED:
        allowed = [each for each in candidates if each["strength"] >= 0.9]
    else:
        allowed = [each for each in candidates if each["overlap"] >= _LEAST_OVERLAP or each["strength"] == 0]
    best = min(allowed, key=lambda each: each["distance"])
    return Choice(best["shrinkage"], best["strength"], difference, error, reliability, candidates)


class _Side:
    """Rows of one set in folds, the moments of each fold and of all others, and the spectra of these."""

    def __init__(self, rows: NDArray[Any], name: str) -> None:
        self.dim = rows.shape[1]
        self.folds = [rows[fold::NUM_FOLDS] for fold in range(NUM_FOLDS)]
        self.moments = [Moments(self.dim, covariance=True).update(fold) for fold in self.folds]
        self.whole = sum(self.moments, Moments(self.dim, covariance=True))
        self.others = [self.whole - moments for moments in self.moments]
        self.spectra = [spectrum(moments.covariance, name) for moments in self.moments]
        self.other_spectra = [spectrum(moments.covariance, name) for moments in self.others]


def _difference(source: _Side, target: _Side) -> tuple[float, float]:
    means, _ = np.linalg.qr(np.stack([source.whole.mean, target.whole.mean], axis=1))
    across = np.eye(source.dim) - means @ means.T
    # Of unbiased estimates: those of a fold are smaller by 1 / n.
    of_source, of_target = (
        [each.count / (each.count - 1) * across @ each.covariance @ across for each in side.moments]
        for side in (source, target)
    )
    scale = sum(map(np.trace, of_target)) / sum(map(np.trace, of_source))
    differences = [scale * ours - theirs for ours, theirs in zip(of_source, of_target, strict=True)]
    products = [float((a * b).sum()) for a, b in combinations(differences, 2)]
    square = float(np.mean([(a * b).sum() for a, b in combinations(of_target, 2)]))
    return float(np.mean(products)) / square, float(np.std(products)) / np.sqrt(len(products)) / square


def _reliability(source: _Side, target: _Side, shrinkage: float) -> float:
    """Return the correlation of departures from a scale, stepped up from one fold to all (Spearman and Brown)."""
    covariance = source.whole.covariance
    departures = []
    for ours, theirs in zip(source.spectra, target.spectra, strict=True):
        matrix = transport_matrix(ours.shrunken(shrinkage), theirs.shrunken(shrinkage))
        scale = float((matrix * covariance).sum() / np.trace(covariance))
        departures.append(matrix - scale * np.eye(source.dim))
    weighted = [each @ covariance for each in departures]
    square = np.mean([(a * b).sum() for a, b in zip(weighted, departures, strict=True)])
    shared = np.mean([(a * b).sum() for (a, _), (_, b) in combinations(zip(weighted, departures, strict=True), 2)])
    ratio = float(shared / square)
    return NUM_FOLDS * ratio / (1 + (NUM_FOLDS - 1) * ratio)


def _candidates(source: _Side, target: _Side, shrinkages: tuple[float, ...]) -> list[dict[str, float]]:
    distances = np.empty((NUM_FOLDS, len(shrinkages), len(STRENGTHS)))
    overlaps = np.empty_like(distances)
    for fold in range(NUM_FOLDS):
        held_out = source.folds[fold][:_HELD_OUT_ROWS].astype(np.float32)
        wanted = target.folds[fold][:_HELD_OUT_ROWS].astype(np.float32)
        ours, theirs = source.others[fold], target.others[fold]
        fitted = np.concatenate([each[:_HELD_OUT_ROWS] for i, each in enumerate(source.folds) if i != fold])
        k = min(_NEIGHBOURS, len(held_out) - 1)
        before = neighbours(held_out, k)
        spread = _mean_distance(wanted)
        mean, target_mean = (each.mean.astype(np.float32) for each in (ours, theirs))
        centred = np.concatenate([held_out, fitted.astype(np.float32)]) - mean
        scale = np.float32(np.sqrt(theirs.trace / ours.trace))
        for i, shrinkage in enumerate(shrinkages):
            shrunken = (side.other_spectra[fold].shrunken(shrinkage) for side in (source, target))
            moved = centred @ transport_matrix(*shrunken).astype(np.float32).T
            for j, strength in enumerate(STRENGTHS):
                rows = _unit((1 - np.float32(strength)) * scale * centred + np.float32(strength) * moved + target_mean)
                correction = target_mean - rows[len(held_out) :].mean(axis=0)
                mapped = _unit(rows[: len(held_out)] + correction)
                distances[fold, i, j] = 2 * _mean_distance(mapped, wanted) - _mean_distance(mapped) - spread
                overlaps[fold, i, j] = overlap(before, neighbours(mapped, k))
    errors = distances.std(axis=0, ddof=1) / np.sqrt(NUM_FOLDS)
    return [
        {
            "shrinkage": shrinkage,
            "strength": strength,
            "distance": float(distances[:, i, j].mean()),
            "distance_error": float(errors[i, j]),
            "overlap": float(overlaps[:, i, j].mean()),
        }
        for i, shrinkage in enumerate(shrinkages)
        for j, strength in enumerate(STRENGTHS)
    ]


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _mean_distance(rows: NDArray[np.float32], others: NDArray[np.float32] | None = None) -> float:
    """Return the mean distance between unit rows of two sets, or between different rows of one."""
    products = rows @ (rows if others is None else others).T
    distances = np.sqrt(np.maximum(2 - 2 * products, 0))
    if others is not None:
        return float(distances.mean(dtype=np.float64))
    np.fill_diagonal(distances, 0)
    return float(distances.sum(dtype=np.float64)) / (len(rows) * (len(rows) - 1))
