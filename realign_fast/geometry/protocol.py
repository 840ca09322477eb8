"""Does an alignment hold on what it was not fitted on: other rows, other domains, other mixtures, fewer rows.

All functions take arrays and look at the rows' directions alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..alignment import Alignment, fit
from ..moments import Moments
from . import centroids, neighbors

__all__ = ["Split", "held_out_gap", "sample_size_curve", "shifted_mixtures", "sizes_up_to", "split", "transfer"]

_SMALLEST, _FEWEST = 100, 8
_MIXTURE_CLUSTERS = 8


class Split(NamedTuple):
    """Rows to fit on, and others of the same sets to measure on, each `(n, dim)`; the four of any lengths.

    Attributes
    ----------
    text, image : ndarray
        The statistics come from these.
    held_text, held_image : ndarray
        Disjoint from them.
    """

    text: NDArray[Any]
    image: NDArray[Any]
    held_text: NDArray[Any]
    held_image: NDArray[Any]


def split(text: ArrayLike, image: ArrayLike, *, seed: int = 0, paired: bool = False) -> Split:
    """Divide two sets at random, by `seed`: into halves, or, of pairs, into thirds.

    Of paired sets one third gives the text statistics, another the image statistics, and the last is held out: no pair
    has both its rows in the fit.

    Raises
    ------
    ValueError
        If a set has fewer than 4 rows (of pairs, 6), or `paired` sets have different lengths.
    """
    sets = [np.asarray(text), np.asarray(image)]
    least = 6 if paired else 4
    for name, rows in zip(("text", "image"), sets, strict=True):
        if rows.ndim != 2 or len(rows) < least:
            raise ValueError(f"{name} must have shape (n, dim) and at least {least} rows to be split, got {rows.shape}")
    if not paired:
        orders = [np.random.default_rng([seed, side]).permutation(len(rows)) for side, rows in enumerate(sets)]
        parts = [np.sort(part) for order in orders for part in np.array_split(order, 2)]
        return Split(sets[0][parts[0]], sets[1][parts[2]], sets[0][parts[1]], sets[1][parts[3]])
    if len(sets[0]) != len(sets[1]):
        raise ValueError(
            f"pairs need sets of equal length, got {len(sets[0])} rows of text and {len(sets[1])} of image"
        )
    first, second, rest = (
        np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(len(sets[0])), 3)
    )
    return Split(sets[0][first], sets[1][second], sets[0][rest], sets[1][rest])


def held_out_gap(
    alignment: Alignment, held_text: ArrayLike, held_image: ArrayLike, *, num_threads: int | None = None
) -> float:
    """Return how far the means of `held_text` `(n, dim)` and `held_image` `(m, dim)` are apart once mapped."""
    return _gap(*_mapped(alignment, np.asarray(held_text), np.asarray(held_image), num_threads))


def _mapped(
    alignment: Alignment, text: NDArray[Any], image: NDArray[Any], num_threads: int | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what becomes of rows of both sides."""
    return (
        alignment.transform(text, dtype="float32", num_threads=num_threads),
        alignment.transform(image, dtype="float32", side="target", num_threads=num_threads),
    )


def _gap(text: NDArray[np.float32], image: NDArray[np.float32]) -> float:
    means = [Moments(rows.shape[1]).update(rows).mean for rows in (text, image)]
    return float(np.linalg.norm(means[0] - means[1]))


def sizes_up_to(num_rows: int) -> list[int]:
    """Return 100, 316, 1000, ... up to half of `num_rows`, that draws differ; eighths of that where it is little."""
    half = num_rows // 2
    sizes = (round(_SMALLEST * 10 ** (step / 2)) for step in count())
    found = list(takewhile(lambda size: size <= half, sizes))
    return found if len(found) > 2 else [half // part for part in (8, 4, 2, 1) if half // part >= _FEWEST]


def sample_size_curve(
    rows: Split,
    *,
    method: str = "realign",
    sizes: list[int] | None = None,
    num_draws: int = 5,
    seed: int = 0,
    num_threads: int | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Return the held-out gap of fits on few and many rows.

    Parameters
    ----------
    rows
        Where the rows of the fits are drawn from, without repeats, and those on which all are measured.
    method, options
        As `fit` takes them.
    sizes
        Rows a side; by default `sizes_up_to` the smaller set.
    num_draws
        Fits of each size.
    seed
        Of the draws.
    num_threads
        By default the cores this process may use.

    Returns
    -------
    list of dict
        `rows`, `mean` and `std` of the gap over the draws, and `floor`: the gap expected of the noise of the means
        alone, `sqrt((T_y + T_x) (1 / n + 1 / m))` with `n` rows a side in the fit and `m` held out.
    """
    found = []
    for size in sizes_up_to(min(len(rows.text), len(rows.image))) if sizes is None else sizes:
        gaps, traces = [], 0.0
        for number in range(num_draws):
            rng = np.random.default_rng([seed, size, number])
            drawn = [each[np.sort(rng.choice(len(each), size, replace=False))] for each in (rows.text, rows.image)]
            alignment = fit(*drawn, method=method, num_threads=num_threads, **options)
            gaps.append(held_out_gap(alignment, rows.held_text, rows.held_image, num_threads=num_threads))
            traces += (alignment.source.trace + alignment.target.trace) / num_draws
        found.append(curve_point(size, gaps, noise_floor(traces, size, len(rows.held_text))))
    return found


def noise_floor(traces: float, num_fit: int, num_held_out: int) -> float:
    """Return the gap expected of the noise of the means alone, of sets whose traces add up to `traces`."""
    return float(np.sqrt(traces * (1 / num_fit + 1 / num_held_out)))


def curve_point(num_rows: int, gaps: list[float], floor: float) -> dict[str, float]:
    """Return one point of `sample_size_curve`."""
    return {"rows": num_rows, "mean": float(np.mean(gaps)), "std": float(np.std(gaps, ddof=1)), "floor": floor}


def transfer(
    domains: Mapping[str, Split],
    *,
    method: str = "realign",
    k: int = 20,
    num_threads: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fit on each domain and measure on the rows held out of every domain.

    Parameters
    ----------
    domains
        The rows of each, by its name.
    method, options
        As `fit` takes them.
    k
        Neighbours for the mixing.
    num_threads
        By default the cores this process may use.

    Returns
    -------
    dict
        `method`; `names`; `gap` and `mixing`, nested lists: row i is the fit on domain i, column j what was measured on
        domain j.

    Raises
    ------
    ValueError
        If there are fewer than two domains, or a held-out set has no more than `k` rows.
    """
    if len(domains) < 2:
        raise ValueError(f"transfer needs at least two domains, got {len(domains)}")
    gap, mixing = [], []
    for rows in domains.values():
        alignment = fit(rows.text, rows.image, method=method, num_threads=num_threads, **options)
        pairs = [_mapped(alignment, each.held_text, each.held_image, num_threads) for each in domains.values()]
        gap.append([_gap(*pair) for pair in pairs])
        mixing.append([_mixing(*pair, k, num_threads) for pair in pairs])
    return {"method": method, "names": list(domains), "gap": gap, "mixing": mixing}


def _mixing(text: NDArray[np.float32], image: NDArray[np.float32], k: int, num_threads: int | None) -> float:
    least = min(len(text), len(image))
    return neighbors.knn_mixing(text[:least], image[:least], k, num_threads=num_threads)


def shifted_mixtures(
    rows: Split,
    *,
    shifts: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_centroids: int = 64,
    method: str = "realign",
    seed: int = 0,
    num_threads: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fit on text whose mixture has shifted, and measure on text of the old mixture.

    The text is clustered (spherical k-means, 8 clusters); every other one of them, by size, loses the share `shift` of
    its rows before the fit. The images stay.

    Parameters
    ----------
    rows
        To fit on, and to measure on.
    shifts
        Shares to lose, from 0 to 1.
    num_centroids
        Of `centroids.occupancy`.
    method, options
        As `fit` takes them.
    seed
        Of clusters, centroids and the rows that leave.
    num_threads
        By default the cores this process may use.

    Returns
    -------
    dict
        `method`, and `points`: for each shift the held-out `gap`, and `coverage` and `js` of `centroids.occupancy`.
    """
    labels = centroids.cluster(rows.text, _MIXTURE_CLUSTERS, seed=seed, num_threads=num_threads)
    by_size = np.argsort(-np.bincount(labels, minlength=_MIXTURE_CLUSTERS), kind="stable")
    leaves = np.isin(labels, by_size[1::2])
    draws = np.random.default_rng(seed).random(len(labels))
    points = []
    for shift in shifts:
        alignment = fit(
            rows.text[~leaves | (draws >= shift)], rows.image, method=method, num_threads=num_threads, **options
        )
        text, image = _mapped(alignment, rows.held_text, rows.held_image, num_threads)
        found = centroids.occupancy(
            image, rows.held_text, text, num_centroids=num_centroids, seed=seed, num_threads=num_threads
        )
        points.append(
            {
                "shift": shift,
                "gap": _gap(text, image),
                "coverage": found.coverage_after,
                "js": found.js_after,
            }
        )
    return {"method": method, "points": points}
