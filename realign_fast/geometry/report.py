"""Whether an alignment works, measured on rows it was not fitted on, and written as a page.

The page, its plots and `report.json` hold the same figures; `compare` gives those of one alignment as a dict.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _files
from .._extras import import_extra
from .._progress import say
from .._reader import Reader
from .._version import __version__
from ..alignment import Alignment, check_dims, fit_sources
from ..io.sources import Source, open_source
from ..methods import anchor_trace, get_method
from ..moments import Moments, OnBadRows, check_on_bad_rows
from . import protocol
from ._measure import Ground, Settings
from ._sources import Fold, draw, few, numbers_of
from ._verdict import verdict

# Rows a side from which fits of few and many rows are drawn, and which other domains give.
_CURVE_ROWS, _DOMAIN_ROWS = 32_768, 10_000
_NUM_DRAWS = 5
# Fewer say nothing: see Ground, and the folds are a third of them.
_FEWEST_ROWS = 80


def compare(
    text: Any,
    image: Any,
    alignment: Alignment | None = None,
    *,
    paired: bool = False,
    num_rows: int = 20_000,
    k: int = 20,
    num_centroids: int = 64,
    seed: int = 0,
    on_bad_rows: OnBadRows = "raise",
    num_threads: int | None = None,
    key: str | None = None,
    text_column: str | None = None,
    image_column: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure text against images, as they are and as an alignment maps them.

    Centroids, traces, spectra and what follows from covariances are those of all rows; neighbours, cosines, centroids
    of k-means and two-sample tests those of a sample. Parameters that are not explained here are those of `fit`.

    Parameters
    ----------
    text, image
        As `fit` takes them; sets that can be read again. Rows that the alignment was fitted on flatter it: the result
        says if they are the same.
    paired
        Whether row i of `text` belongs to row i of `image`. Sets of different lengths are no pairs: then `notes` says
        so, and what needs pairs is left out.
    num_rows
        In the sample of each side.
    k
        Neighbours for the mixing.
    num_centroids
        Of the spherical k-means on the images.
    seed
        Of the sample and all other draws.
    on_bad_rows
        "raise" or "skip".
    limit
        Look at the first so many rows of each side.

    Returns
    -------
    dict
        `before` and, with an alignment, `after`: the metrics, each a number or a dict of `value`, `interval` and what
        it depends on, None where it does not apply; `target`, what is to be said of the images alone; `frame`, the
        decomposition of the gap of pairs; `noise_floor`, the gap that samples of one distribution would have;
        `measured_on`; `notes`.

    Raises
    ------
    ValueError
        If the dimensions differ, there are too few rows, or all rows of a set are equal.
    BadRowsError
        A ValueError naming file and row, under "raise".
    ImportError
        If FAISS and torch are both missing.
    """
    sources = _open(text, image, key, text_column, image_column, num_threads)
    notes: list[str] = []
    settings = Settings(
        num_rows, seed, k, num_centroids=num_centroids, on_bad_rows=_policy(on_bad_rows), num_threads=num_threads,
        paired=_are_pairs(sources, paired, limit, notes),
    )  # fmt: skip
    if alignment is not None and alignment.dim != sources[0].dim:
        raise ValueError(f"alignment has dimension {alignment.dim}, the rows have {sources[0].dim}")
    whole = [Fold(source, 1, 0, seed, limit, on_bad_rows == "raise") for source in sources]
    ground = Ground(whole[0], whole[1], settings)
    before = ground.measure("none", None, {})
    found = {
        "measured_on": _measured_on(ground, None if alignment is None else _fitted_on(alignment, sources, ground)),
        "noise_floor": before["gap"]["noise_floor"],
        "target": ground.target_entry(),
        "before": before,
        "frame": ground.frame() if settings.paired else None,
        "notes": notes,
    }
    if alignment is not None:
        in_fit = found["measured_on"]["used_in_fit"]
        found["after"] = ground.measure(alignment.method, alignment, _options(alignment), in_fit=in_fit)
    return found


def report(
    text: Any,
    image: Any,
    output: str | os.PathLike[str],
    *,
    alignment: str | os.PathLike[str] | Alignment | None = None,
    methods: Sequence[str] = ("realign",),
    paired: bool = False,
    domains: Mapping[str, tuple[Any, Any]] | None = None,
    num_rows: int = 20_000,
    k: int = 20,
    num_centroids: int = 64,
    seed: int = 0,
    on_bad_rows: OnBadRows = "raise",
    num_threads: int | None = None,
    text_column: str | None = None,
    image_column: str | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Fit methods to one part of two sets, measure them on another, and write `report.html`, plots and `report.json`.

    The sets are divided by row: halves, or, of pairs, thirds, so that no pair has both rows in the statistics. Methods
    with noise are measured with it. Parameters that are not explained here, and the errors, are those of `compare`.

    Parameters
    ----------
    text, image
        Paths, globs, directories, URLs or arrays, as `fit` takes them.
    output
        Directory for the files.
    alignment
        One fitted elsewhere, or its file, measured beside the methods; where it was fitted on these very sets, the
        report says so, and its method is fitted to the first part too.
    methods
        Of `fit`, by name, with their usual options.
    domains
        Further pairs of sets by name: then each domain's fit is measured on every domain.
    overwrite
        Write into a directory that is not empty.
    progress
        Say on stderr what is being done.

    Returns
    -------
    dict
        What `report.json` holds.

    Raises
    ------
    FileExistsError
        If `output` is not empty and `overwrite` is not set.
    ImportError
        If matplotlib is missing, or FAISS and torch both are.
    """
    from . import _page, _plots

    import_extra("matplotlib", "the report", extra="report")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise FileExistsError(f"{folder} is not empty: pass --overwrite or another folder")
    for method in methods:
        get_method(method, {})
    given = alignment if alignment is None or isinstance(alignment, Alignment) else Alignment.load(alignment)
    if given is None and not methods:
        raise ValueError("a report needs an alignment or at least one method")
    sources = _open(text, image, None, text_column, image_column, num_threads)
    if given is not None and given.dim != sources[0].dim:
        raise ValueError(f"alignment has dimension {given.dim}, the rows have {sources[0].dim}")
    notes: list[str] = []
    settings = Settings(
        num_rows, seed, k, num_centroids=num_centroids, on_bad_rows=_policy(on_bad_rows), num_threads=num_threads,
        paired=_are_pairs(sources, paired, limit, notes),
    )  # fmt: skip
    least = min(_num_rows(source, limit) for source in sources)
    if least < _FEWEST_ROWS:
        raise ValueError(f"a report needs at least {_FEWEST_ROWS} rows a side, got {least}: compare() takes fewer")
    job = _Job(sources, settings, limit, progress)
    with job.saying("measure text and images as they are"):
        ground = job.ground(seed)
        entries = [ground.measure("none", None, {}) | {"seconds": None}]
    steps: list[tuple[str, Alignment | None, str]] = [(method, None, method) for method in methods]
    fitted_on = None
    if given is not None:
        fitted_on = _fitted_on(given, sources, None)
        name = given.method if given.method not in methods else f"{given.method} (given)"
        if fitted_on and given.method not in methods:
            steps.insert(0, (given.method, None, given.method))
            name = f"{given.method} (given)"
        steps.insert(0, (name, given, given.method))
    for name, ready, method in steps:
        with job.saying(name):
            began = time.monotonic()
            fitted = job.fit(method, seed) if ready is None else ready
            in_fit = fitted_on if ready is not None else False
            entry = ground.measure(name, fitted, _options(fitted), in_fit=in_fit)
            entry["gap"] |= {
                "steps": _steps(ground, fitted, name, entries[0]["gap"]["value"], entry["gap"]["value"]),
                "in_sample": job.in_sample(fitted, seed) if ready is None else None,
            }
            entry["seconds"] = round(time.monotonic() - began, 1)
            if in_fit:
                entry["notes"].append(
                    "This alignment was fitted on all rows of these sets: its figures flatter it. The fit to a part of "
                    "them, beside it, was not."
                )
            entries.append(entry)
    primary = steps[0][2] if given is None or not fitted_on else given.method
    with job.saying("gap against the number of rows"):
        curve = job.curve(ground, primary, _options_of(entries, primary))
    found: dict[str, Any] = {
        "format": "realign-report",
        "version": 1,
        "package": __version__,
        "text": _describe(sources[0], text, limit, ground.source),
        "image": _describe(sources[1], image, limit, ground.target),
        "paired": settings.paired,
        "measured_on": _measured_on(ground, False if given is None else fitted_on),
        "noise_floor": entries[0]["gap"]["noise_floor"],
        "target": ground.target_entry(),
        "methods": entries,
        "sample_size": {"method": primary, "points": curve},
        "transfer": None,
        "mixtures": None,
        "frame": ground.frame() if settings.paired else None,
        "notes": notes,
    }
    with job.saying("fits on shifted mixtures"):
        found["mixtures"] = job.mixtures(ground, primary, _options_of(entries, primary), notes)
    if domains:
        with job.saying("transfer between domains"):
            found["transfer"] = job.transfer(
                ground, primary, _options_of(entries, primary), domains, text_column, image_column
            )
    found["verdict"] = verdict(found)
    with job.saying("draw"):
        light, dark = (_plots.draw(found, dark=dark) for dark in (False, True))
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in light.items():
            _files.write_atomically(folder / f"{name}.png", png)
        encoded = json.dumps(found, indent=1, allow_nan=False) + "\n"
        _files.write_atomically(folder / "report.json", encoded.encode())
        _files.write_atomically(folder / "report.html", _page.render(found, light, dark).encode())
    return found


class _Job:
    """The parts of two sets, and the fits and measurements on them."""

    def __init__(self, sources: tuple[Source, Source], settings: Settings, limit: int | None, progress: bool) -> None:
        self._sources, self._settings, self._limit, self._progress = sources, settings, limit, progress
        self._reader = Reader(settings.on_bad_rows, settings.num_threads)
        self._rows: protocol.Split | None = None

    @contextmanager
    def saying(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        if self._progress:
            say(f"report: {what}: {time.monotonic() - began:.1f} s")

    def _parts(self, seed: int) -> tuple[Fold, Fold, Fold, Fold]:
        """Return text and image to fit on, and text and image to measure on."""
        num_folds = 3 if self._settings.paired else 2
        image_fold = 1 if self._settings.paired else 0
        refuses = self._settings.on_bad_rows == "raise"
        text, image = self._sources

        def fold(source: Source, number: int) -> Fold:
            return Fold(source, num_folds, number, seed, self._limit, refuses)

        return fold(text, 0), fold(image, image_fold), fold(text, num_folds - 1), fold(image, num_folds - 1)

    def ground(self, seed: int) -> Ground:
        return Ground(*self._parts(seed)[2:], self._settings)

    def fit(self, method: str, seed: int, options: Mapping[str, Any] | None = None) -> Alignment:
        text, image = self._parts(seed)[:2]
        threads = self._settings.num_threads
        return fit_sources(text, image, self._reader, method, options or {}, threads, held_out=False)

    def in_sample(self, alignment: Alignment, seed: int) -> float:
        text, image = self._parts(seed)[:2]
        return self._gap(alignment, text, image)

    def _gap(self, alignment: Alignment, text: Source, image: Source) -> float:
        source = self._reader.transformed_moments(text, alignment.parameters)
        target = self._reader.transformed_moments(image, alignment.parameters_of("target"))
        return float(np.linalg.norm(source.mean - target.mean))

    def _draw(self, place: int, num_rows: int) -> NDArray[np.float32]:
        """Return so many rows of one of the parts."""
        part, seed = self._parts(self._settings.seed)[place], self._settings.seed + place
        return draw(part, numbers_of(part.num_rows or 0, num_rows, seed), self._settings.num_threads).rows

    def _split(self, ground: Ground) -> protocol.Split:
        """Return rows of the first part, in memory, and those on which neighbours were measured."""
        if self._rows is None:
            text, image = self._draw(0, _CURVE_ROWS), self._draw(1, _CURVE_ROWS)
            self._rows = protocol.Split(text, image, ground.drawn_text.rows, ground.drawn_image.rows)
        return self._rows

    def curve(self, ground: Ground, method: str, options: Mapping[str, Any]) -> list[dict[str, float]]:
        """Return the held-out gap against rows in the fit: of draws in memory, and of all rows not held out."""
        settings = self._settings
        points = protocol.sample_size_curve(
            self._split(ground),
            method=method,
            num_draws=_NUM_DRAWS,
            seed=settings.seed,
            num_threads=settings.num_threads,
            **options,
        )
        gaps, floors, counts = [], [], []
        for number in range(_NUM_DRAWS):
            seed = settings.seed + number
            fitted = self.fit(method, seed, options)
            held_text, held_image = self._parts(seed)[2:]
            gaps.append(self._gap(fitted, held_text, held_image))
            counts.append(min(fitted.source.count, fitted.target.count))
            floors.append(
                protocol.noise_floor(
                    fitted.source.trace + fitted.target.trace,
                    counts[-1],
                    min(held_text.num_rows or 0, held_image.num_rows or 0),
                )
            )
        return [*points, protocol.curve_point(min(counts), gaps, float(np.mean(floors)))]

    def mixtures(
        self, ground: Ground, method: str, options: Mapping[str, Any], notes: list[str]
    ) -> dict[str, Any] | None:
        settings = self._settings
        try:
            return protocol.shifted_mixtures(
                self._split(ground),
                method=method,
                num_centroids=settings.num_centroids,
                seed=settings.seed,
                num_threads=settings.num_threads,
                **options,
            )
        except (ImportError, ValueError) as error:
            notes.append(f"Shifted mixtures were not measured: {error}")
            return None

    def transfer(
        self,
        ground: Ground,
        method: str,
        options: Mapping[str, Any],
        domains: Mapping[str, tuple[Any, Any]],
        text_column: str | None,
        image_column: str | None,
    ) -> dict[str, Any]:
        settings = self._settings
        splits = {"these sets": protocol.Split(*(few(rows, _DOMAIN_ROWS) for rows in self._split(ground)))}
        for name, (text, image) in domains.items():
            sources = _open(text, image, None, text_column, image_column, settings.num_threads)
            if sources[0].dim != ground.text.dim:
                raise ValueError(f"domain {name} has dimension {sources[0].dim}, text and image have {ground.text.dim}")
            job = _Job(sources, settings, self._limit, progress=False)
            splits[name] = protocol.Split(*(job._draw(place, _DOMAIN_ROWS) for place in range(4)))
        return protocol.transfer(splits, method=method, k=settings.k, num_threads=settings.num_threads, **options)


def _open(
    text: Any, image: Any, key: str | None, text_column: str | None, image_column: str | None, num_threads: int | None
) -> tuple[Source, Source]:
    opened = []
    for name, data, column, side in (("text", text, text_column, "source"), ("image", image, image_column, "target")):
        source = open_source(data, name=name, key=key, column=column, side=side, num_threads=num_threads)  # type: ignore[arg-type]
        if not source.reiterable:
            raise TypeError(
                f"{name} can be read only once, and is read again and again here: pass an array, paths, a list of "
                "batches, or an object whose __iter__ starts anew each time"
            )
        if source.num_rows is None:
            source.num_rows = sum(len(batch.rows.values) for batch in source.batches())
        opened.append(source)
    check_dims(opened[0], opened[1])
    return opened[0], opened[1]


def _num_rows(source: Source, limit: int | None) -> int:
    assert source.num_rows is not None
    return source.num_rows if limit is None else min(source.num_rows, limit)


def _policy(on_bad_rows: OnBadRows) -> OnBadRows:
    check_on_bad_rows(on_bad_rows)
    if on_bad_rows == "zero":
        raise ValueError("on_bad_rows must be 'raise' or 'skip' here: zero rows have no direction to measure")
    return on_bad_rows


def _are_pairs(sources: tuple[Source, Source], paired: bool, limit: int | None, notes: list[str]) -> bool:
    text, image = (_num_rows(source, limit) for source in sources)
    if paired and text != image:
        notes.append(
            f"The sets are no pairs: {text} rows of text, {image} of images. What needs pairs was left out: recall, "
            "cosine to the paired image, agreement of centroids, the decomposition of the gap."
        )
    return paired and text == image


def _measured_on(ground: Ground, fitted_on: bool | None) -> dict[str, Any]:
    return {
        "rows": min(ground.text.num_rows or 0, ground.image.num_rows or 0),
        "used_in_fit": fitted_on,
        "sample": ground.num_rows,
        "seed": ground.settings.seed,
    }


def _fitted_on(alignment: Alignment, sources: tuple[Source, Source], ground: Ground | None) -> bool | None:
    """Return whether an alignment was fitted on just these sets; None where that cannot be known."""
    prints = [source.fingerprint() for source in sources]
    known = [alignment.fingerprints.get(source.name) for source in sources]
    if None not in prints and None not in known:
        return prints == known or None
    if ground is None:
        return None
    for statistics, moments in ((alignment.source, ground.source), (alignment.target, ground.target)):
        if moments.count != statistics.count or not np.array_equal(moments.mean, statistics.mean):
            return None
    return True


def _describe(source: Source, data: Any, limit: int | None, measured: Moments) -> dict[str, Any]:
    given = data if isinstance(data, list | tuple) else [data]
    paths = [os.fspath(item) for item in given if isinstance(item, str | os.PathLike)]
    return {
        "name": source.name,
        "paths": paths,
        "rows": _num_rows(source, limit),
        "dim": source.dim,
        "dtype": source.dtype,
        "bad_rows": measured.num_skipped,
    }


def _steps(ground: Ground, alignment: Alignment, name: str, before: float, after: float) -> list[list[Any]]:
    """Return the held-out gap after each step of a map."""
    found: list[list[Any]] = [["none", before]]
    if alignment.method in ("realign", "anchor_trace"):
        statistics: Any = SimpleNamespace(source=alignment.source, target=alignment.target)
        parts = anchor_trace(statistics).steps
        for step in ("anchor", "trace") if alignment.method == "realign" else ("anchor",):
            moments = ground.reader.transformed_moments(ground.text, parts[step])
            found.append([step, float(np.linalg.norm(moments.mean - ground.target.mean))])
    return [*found, [name, after]]


def _options(alignment: Alignment) -> dict[str, Any]:
    found: dict[str, Any] = alignment.report.get("options", {})
    return found


def _options_of(entries: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Return the options with which a method was fitted, those it has chosen itself among them."""
    found: dict[str, Any] = next((entry["options"] for entry in entries if entry["name"] == method), {})
    return found
