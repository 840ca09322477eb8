"""One map measured on one pair of sets: every metric, over all rows where it can be, else on a sample of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._reader import Reader
from ..alignment import Alignment
from ..io.sources import Source
from ..methods import Parameters, check_sets
from ..moments import Moments, OnBadRows
from . import centroids, frame, neighbors, spectra, two_sample
from ._sources import Drawn, Mapped, draw, few, numbers_of

# Points of a scatter plot, and of a spectrum.
_NUM_POINTS, _NUM_VALUES = 1500, 512
_NORMAL_95 = 1.959964
# Principal directions of both sets whose spans are compared.
_SUBSPACE = 32
_RECALLS = (1, 5, 10)
_COSINE_ROWS = 4000


def _only(drawn: Drawn, numbers: NDArray[np.int64]) -> Drawn:
    return Drawn(drawn.rows[np.isin(drawn.numbers, numbers)], numbers)


@dataclass(frozen=True)
class Settings:
    """How sets are measured.

    Attributes
    ----------
    num_rows : int
        Rows a side in the sample.
    seed : int
        Of the sample and all draws.
    k, overlap_k : int
        Neighbours for mixing and for overlap.
    num_centroids : int
    paired : bool
        Whether row i of one set belongs to row i of the other.
    on_bad_rows : "raise" or "skip"
    num_threads : int or None
    """

    num_rows: int = 20_000
    seed: int = 0
    k: int = 20
    overlap_k: int = 10
    num_centroids: int = 64
    paired: bool = False
    on_bad_rows: OnBadRows = "raise"
    num_threads: int | None = None


def gap_of(source: Moments, target: Moments, fitted: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return the centroid gap of two sets, what noise alone gives, and the interval of the gap beneath the noise.

    Of `m`, the difference of the means, with `S = Cov_y (1 / n + 1 / n_fit) + Cov_x (1 / m + 1 / m_fit)`,
    `||m||^2 - tr S` estimates the squared gap without bias and has variance `4 m^T S m + 2 tr(S^2)`. `fitted` are the
    rows of text and images behind the map, whose means have noise of their own; none where there is no map, or where it
    was fitted on these rows.
    """
    difference = source.mean - target.mean
    noise = np.zeros_like(source.covariance)
    for place, moments in enumerate((source, target)):
        noise += moments.covariance * (1 / moments.count + (1 / fitted[place] if fitted else 0))
    square, floor = float(difference @ difference), float(np.trace(noise))
    deviation = float(np.sqrt(4 * difference @ noise @ difference + 2 * (noise**2).sum()))
    low, high = (max(0.0, square - floor + sign * _NORMAL_95 * deviation) for sign in (-1, 1))
    return {
        "value": float(np.sqrt(square)),
        "noise_floor": float(np.sqrt(floor)),
        "interval": [float(np.sqrt(low)), float(np.sqrt(high))],
    }


def spectrum_entry(values: NDArray[np.float64]) -> dict[str, Any]:
    """Return eigenvalues, largest first, thinned for a plot, and their exponent."""
    try:
        law = spectra.spectrum_exponent(values)
    except ValueError:  # too few directions for a slope
        law = None
    ranks = np.arange(1, len(values) + 1)
    if len(ranks) > _NUM_VALUES:
        ranks = np.unique(np.geomspace(1, len(values), _NUM_VALUES).round().astype(int))
    return {
        "values": values[ranks - 1].tolist(),
        "ranks": ranks.tolist(),
        "exponent": law and law.exponent,
        "range": law and list(law.ranks),
    }


def _cosines(rows: NDArray[np.float32]) -> dict[str, list[float]]:
    edges, density = spectra.cosine_density(few(rows, _COSINE_ROWS))
    return {"edges": edges.tolist(), "density": density.tolist()}


def _angular_js(cosines: dict[str, list[float]], others: dict[str, list[float]]) -> float:
    """Return `spectra.angular_js` of rows from their densities."""
    widths = np.diff(cosines["edges"])
    return spectra.jensen_shannon(*(widths * each["density"] for each in (cosines, others)))


def _compared(
    source: Moments,
    target: Moments,
    values: NDArray[np.float64],
    target_values: NDArray[np.float64],
    notes: list[str],
) -> dict[str, float | None]:
    """Return what compares two spectra; None where too few directions carry variance."""
    found: dict[str, float | None] = {"spectrum_correlation": None, "subspace_overlap": None}
    try:
        found["spectrum_correlation"] = spectra.spectrum_correlation(values, target_values)
        q = min(_SUBSPACE, source.count - 1, target.count - 1, source.dim)
        found["subspace_overlap"] = spectra.subspace_overlap(source, target, q)
    except ValueError as error:
        notes.append(f"Spectra were not compared: {error}.")
    return found


class Ground:
    """Text and image rows on which maps are measured, and what of it no map changes.

    Parameters
    ----------
    text, image
        Rows that no map to be measured was fitted on.
    settings
        How. `settings.paired` asks for sets of equal length.
    """

    def __init__(self, text: Source, image: Source, settings: Settings) -> None:
        self.text, self.image, self.settings = text, image, settings
        self.reader = Reader(settings.on_bad_rows, settings.num_threads)
        assert text.num_rows is not None
        assert image.num_rows is not None
        seed, count = settings.seed, min(settings.num_rows, text.num_rows, image.num_rows)
        of_text = numbers_of(text.num_rows, count, seed)
        of_image = of_text if settings.paired else numbers_of(image.num_rows, count, seed + 1)
        ours, theirs = self._draw(text, of_text), self._draw(image, of_image)
        if settings.paired:
            both = np.intersect1d(ours.numbers, theirs.numbers)
            self.drawn_text, self.drawn_image = _only(ours, both), _only(theirs, both)
        else:
            least = min(len(ours.numbers), len(theirs.numbers))
            self.drawn_text, self.drawn_image = _only(ours, ours.numbers[:least]), _only(theirs, theirs.numbers[:least])
        self.num_rows = len(self.drawn_text.numbers)
        # As many neighbours as any metric asks for; of recalls, one more than they count.
        self._k = max(settings.k, settings.overlap_k, max(_RECALLS) + 1)
        if self.num_rows <= self._k:
            raise ValueError(f"expected more than {self._k} rows a side to measure neighbours on, got {self.num_rows}")
        self.source, self.target = self._moments(text), self._moments(image)
        check_sets(self.source, self.target)

    def _draw(self, source: Source, numbers: NDArray[np.int64]) -> Drawn:
        return draw(source, numbers, self.settings.num_threads)

    def _moments(self, source: Source) -> Moments:
        return self.reader.moments(source, covariance=True)

    @cached_property
    def plane(self) -> frame.Plane:
        """The two directions in which both sets together, as they are, vary most."""
        return frame.principal_plane(self.drawn_text.rows, self.drawn_image.rows)

    @cached_property
    def neighbours(self) -> neighbors.Neighbours:
        """Of the text rows among themselves, before any map."""
        return self._nearest(self.drawn_text.rows)

    @cached_property
    def image_neighbours(self) -> neighbors.Neighbours:
        """Of the image rows among themselves."""
        return self._nearest(self.drawn_image.rows)

    def _nearest(
        self, queries: NDArray[np.float32], candidates: NDArray[np.float32] | None = None
    ) -> neighbors.Neighbours:
        return neighbors.nearest(queries, candidates, self._k, num_threads=self.settings.num_threads)

    @cached_property
    def image_cosines(self) -> dict[str, list[float]]:
        """Density of the cosines between image rows."""
        return _cosines(self.drawn_image.rows)

    @cached_property
    def target_values(self) -> NDArray[np.float64]:
        """Eigenvalues of the images' covariance."""
        return spectra.eigenvalues(self.target)

    def target_entry(self) -> dict[str, Any]:
        """Return what is to be shown of the images."""
        return {
            "spectrum": spectrum_entry(self.target_values),
            "cosines": self.image_cosines,
            "scatter": self._scatter(self.drawn_image.rows),
        }

    def measure(
        self, name: str, alignment: Alignment | None, options: Mapping[str, Any], *, in_fit: bool | None = False
    ) -> dict[str, Any]:
        """Return the metrics of what a map makes of the text (none: the text as it is) against the images.

        `in_fit` says whether these rows were in the fit of the map.
        """
        fitted = None
        if alignment is not None and not in_fit:
            fitted = alignment.source.count, alignment.target.count
        settings = self.settings
        notes: list[str] = []
        text, image, target, images = self.text, self.image, self.target, self.drawn_image.rows
        if alignment is not None:
            text = self.mapped(alignment.parameters)
            if alignment.target_parameters is not None:
                image = Mapped(image, alignment.target_parameters, settings.seed, settings.num_threads)
                target, images = self._moments(image), self._draw(image, self.drawn_image.numbers).rows
        source = self.source if alignment is None else self._moments(text)
        rows = self.drawn_text.rows if alignment is None else self._draw(text, self.drawn_text.numbers).rows
        seed = settings.seed
        values = spectra.eigenvalues(source)
        target_values = self.target_values if target is self.target else spectra.eigenvalues(target)
        found = self.neighbours if alignment is None else self._nearest(rows)
        others = self.image_neighbours if target is self.target else self._nearest(images)
        across = self._nearest(rows, images), self._nearest(images, rows)
        cosines = _cosines(rows)
        image_cosines = self.image_cosines if target is self.target else _cosines(images)
        entry: dict[str, Any] = {
            "name": name,
            "options": dict(options),
            "gap": gap_of(source, target, fitted),
            "spectrum": spectrum_entry(values),
            "cosines": cosines | {"js": _angular_js(cosines, image_cosines)},
            "scatter": self._scatter(rows),
            "drift": self._drift(alignment),
            "mixing": neighbors.mixing_of(found, *across, others, settings.k, seed=seed)._asdict(),
            "overlap": neighbors.overlap_of(
                *(each.first(settings.overlap_k) for each in (self.neighbours, found))
            )._asdict(),
            "recall": None,
            "cosine_to_pair": None,
            "residual": None,
            "pairwise_correlation": spectra.pairwise_correlation(
                few(self.drawn_text.rows, _COSINE_ROWS), few(rows, _COSINE_ROWS)
            ),
            "effective_rank": spectra.effective_rank(values),
            "covariance_gap": spectra.covariance_gap(source, target),
            **_compared(source, target, values, target_values, notes),
            "occupancy": self._occupancy(rows, images, notes),
            "two_sample": {
                "mmd": two_sample.mmd(rows, images, seed=seed).as_dict(),
                "sliced_wasserstein": two_sample.sliced_wasserstein(rows, images, seed=seed).as_dict(),
                "frechet": two_sample.frechet(rows, images, seed=seed).as_dict()
                | {"all_rows": two_sample.frechet_of_moments(source, target)},
            },
        }
        if settings.paired:
            entry |= self._paired(rows, images, across)
        return entry | {"notes": notes}

    def frame(self) -> dict[str, Any]:
        """Return the decomposition of the gap of pairs, as the rows are."""
        rows, images = self.drawn_text.rows, self.drawn_image.rows
        of_sets = frame.Frame.of_moments(self.source, self.target)
        found = frame.decompose(rows, images, of_sets)
        return {"rank": of_sets.rank, "energy": of_sets.energy, **asdict(found)}

    def mapped(self, parameters: Parameters) -> Source:
        """Return what a map makes of the text rows."""
        return Mapped(self.text, parameters, self.settings.seed, self.settings.num_threads)

    def _scatter(self, rows: NDArray[np.float32]) -> list[list[float]]:
        points: list[list[float]] = frame.project(few(rows, _NUM_POINTS), self.plane).round(5).tolist()
        return points

    def _drift(self, alignment: Alignment | None) -> dict[str, float] | None:
        if alignment is None or alignment.parameters.affine is not None or alignment.target_parameters is not None:
            return None
        found = frame.phantom_drift(self.drawn_text.rows, alignment.parameters.scale, alignment.parameters.shift)
        return {name: getattr(found, name) for name in ("measured", "predicted", "paper")}

    def _occupancy(
        self, rows: NDArray[np.float32], images: NDArray[np.float32], notes: list[str]
    ) -> dict[str, Any] | None:
        settings = self.settings
        try:
            found = centroids.occupancy(
                images,
                self.drawn_text.rows,
                rows,
                num_centroids=settings.num_centroids,
                seed=settings.seed,
                paired=settings.paired,
                num_threads=settings.num_threads,
            )
        except (ImportError, ValueError) as error:
            notes.append(f"The nearest centroids were not counted: {error}.")
            return None
        return {
            "num_centroids": found.num_centroids,
            "image": found.image.tolist(),
            "text": found.after.tolist(),
            "js": found.js_after,
            "coverage": found.coverage_after,
            "agreement": found.agreement_after,
        }

    def _paired(
        self,
        rows: NDArray[np.float32],
        images: NDArray[np.float32],
        across: tuple[neighbors.Neighbours, neighbors.Neighbours],
    ) -> dict[str, Any]:
        recall = {
            name: {str(k): value for k, value in neighbors.recalls_of(found, _RECALLS).items()}
            for name, found in zip(("text_to_image", "image_to_text"), across, strict=True)
        }
        residual = frame.decompose(rows, images, frame.frame_of(rows, images))
        return {
            "recall": recall,
            "cosine_to_pair": residual.mean_cosine,
            "residual": {"anisotropy": residual.anisotropy, "effective_dimension": residual.effective_dimension},
        }
