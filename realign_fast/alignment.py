"""Fit an alignment and apply it: the two things every user does.

Source: ReAlign (arXiv 2602.07026), Anchor, Trace and Centroid alignment; the refined centroid and the fused form of
the map are ours.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _files
from ._checkpoint import Checkpoint
from ._dtypes import Rows
from ._errors import raise_if_bad
from ._native import _C
from ._progress import progress as show_progress
from ._ranks import ALONE, Ranks
from ._reader import RanksReader, Reader, reader_for
from ._sample import Sample
from ._steps import Affine, Noise, frozen
from ._transform import Steps, transform_by, transform_rows
from .backends import check_has_kernels, choose, find_device
from .io._manifest import encoder_in
from .io.sources import Batch, Done, Source, file_paths, open_source
from .methods import METHODS, Method, Parameters, Solution, check_sets, get_method, unit_length
from .moments import Moments, OnBadRows, Precision, check_on_bad_rows

__all__ = [
    "Alignment",
    "Drift",
    "DriftWarning",
    "SetStatistics",
    "apply_files",
    "fit",
    "fit_from_moments",
    "gather_moments",
]

Side = Literal["source", "target"]

# Newton's matrix is estimated on about so many rows of the sample; an estimate only costs steps, never accuracy.
_NEWTON_ROWS = 16_384
_HELD_OUT_EVERY = 10
_PART_ROWS = 1024  # of a sample at a time


@dataclass(frozen=True)
class SetStatistics:
    """What an alignment keeps of one of its two sets.

    Attributes
    ----------
    count : int
        Rows the statistics count.
    num_zero, num_skipped : int
        Bad rows counted as zeros, and left out.
    trace : float
        Of the covariance of the unit rows.
    mean : ndarray
        `(dim,)` float64, of the unit rows.
    """

    count: int
    num_zero: int
    num_skipped: int
    trace: float
    mean: NDArray[np.float64]

    @classmethod
    def of(cls, moments: Moments) -> SetStatistics:
        """Return those of `moments`."""
        return cls(moments.count, moments.num_zero, moments.num_skipped, moments.trace, frozen(moments.mean))


@dataclass(frozen=True)
class Drift:
    """How far a stream lies from the set that an alignment was fitted on.

    Attributes
    ----------
    num_rows : int
        Rows of the stream that were looked at.
    distance : float
        Between the mean of the stream's unit rows and the mean of the fit.
    noise_floor : float
        Expected distance of two samples of these sizes from one distribution, `sqrt(T / n + T / n_fit)`.
    """

    num_rows: int
    distance: float
    noise_floor: float

    @property
    def drifted(self) -> bool:
        """Whether the distance is more than three noise floors."""
        return self.distance > 3 * self.noise_floor


class DriftWarning(UserWarning):
    """The rows of a loader no longer come from what its alignment was fitted on."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """A fitted map `out = pi(pi(scale * u + shift) + correction)` of rows, with `u = pi(row)`, `pi(z) = z / ||z||`.

    Some methods have a matrix where the scale stands, "c3" adds noise. Made by `fit`, `fit_from_moments` or
    `Alignment.load`; nothing in it changes afterwards.

    Attributes
    ----------
    method : str
        Name of the map, see `fit`.
    parameters : Parameters
        `scale`, `shift` and `correction`, also at hand under these names; `affine`, the matrix; `noise_std`.
    target_parameters : Parameters or None
        What becomes of target rows, where that is more than unit length ("center", "whiten").
    source, target : SetStatistics
        Of the two sets it was fitted on.
    report : dict
        What the fit measured, see `fit`.
    fingerprints : dict
        Of the files it was fitted on, under "text" and "image", where they were files.
    encoder : str or None
        Which encoder made the embeddings, if that was said.
    """

    method: str
    parameters: Parameters
    source: SetStatistics
    target: SetStatistics
    report: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    encoder: str | None = None
    target_parameters: Parameters | None = None

    @property
    def dim(self) -> int:
        """Dimension of the rows."""
        return self.parameters.shift.size

    @property
    def scale(self) -> float:
        """`s`, the ratio of the spreads. ValueError for methods that have a matrix instead."""
        if self.parameters.affine is not None:
            raise ValueError(f"method {self.method!r} has a matrix and no scale: see parameters.affine")
        return self.parameters.scale

    @property
    def shift(self) -> NDArray[np.float64]:
        """`c`, `(dim,)` float64."""
        return self.parameters.shift

    @property
    def correction(self) -> NDArray[np.float64]:
        """`b`, `(dim,)` float64."""
        return self.parameters.correction

    @property
    def fingerprint(self) -> str:
        """Hash of what the map computes; equal for alignments that map every row alike."""
        digest = _C.XXH64()
        digest.update(f"{self.method} {self.parameters.scale.hex()}".encode())
        digest.update(self.shift.tobytes())
        digest.update(self.correction.tobytes())
        if self.parameters.noise_std:
            digest.update(self.parameters.noise_std.hex().encode())
        for name, tensor in _more_tensors(self).items():
            digest.update(name.encode())
            digest.update(tensor.tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Alignment(method={self.method!r}, dim={self.dim}, text={self.source.count}, image={self.target.count})"

    def transform(
        self,
        x: Any,
        out: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
        num_threads: int | None = None,
        side: Side = "source",
        on_bad_rows: Literal["raise", "zero"] = "raise",
        noise_std: float | None = None,
        seed: int = 0,
        index: Any = None,
    ) -> Any:
        """Map rows; an array gives an array, a tensor a tensor, of the same dtype and on the same device.

        Parameters
        ----------
        x
            `(..., dim)` NumPy array or torch tensor of float16, bfloat16, float32 or float64, in any layout.
        out
            Where the result goes, of the shape of `x`; `out=x` works in place. Undefined after an error, except in
            place, where an error leaves `x` as it was.
        dtype
            Of the result where `out` is not given: a name, a NumPy or a torch dtype; by default that of `x`.
        backend
            "auto"; or "cpu", the C++ kernels; or "triton", the GPU kernels; or "torch", plain torch operations, on any
            device. A tensor on a GPU goes through Triton where that can run.
        num_threads
            Of the C++ kernels; by default the cores this process may use, and one inside a DataLoader worker.
        side
            "source" maps text; "target" brings image rows to unit length, as all mapped rows have, or for methods that
            map both sides ("center", "whiten") maps them too.
        on_bad_rows
            What becomes of rows with NaN, infinity or norm zero: "raise", or "zero", which makes them zeros.
        noise_std
            Standard deviation of an element of Gaussian noise, for training: `pi(mapped + noise_std n)`, in float32. By
            default that of the map, which is 0 but for "c3"; target rows get none by default.
        seed, index
            The noise of a row depends on the seed and the row's number alone: `index` is one for each row, of shape
            `(...)`, or that of the first of them; by default 0. For other noise in each epoch, change the seed.

        Raises
        ------
        BadRowsError
            A ValueError: under "raise", naming the first bad row.
        TypeError, ValueError
            If an argument has the wrong kind, dtype, shape or layout.
        """
        parameters = self.parameters_of(side)
        std = parameters.noise_std if noise_std is None else noise_std
        return transform_by(
            Steps.of(parameters, Noise.of(std, seed, index, tuple(getattr(x, "shape", ()))[:-1])),
            x,
            out,
            dtype,
            backend=backend,
            num_threads=num_threads,
            on_bad_rows=on_bad_rows,
        )

    def parameters_of(self, side: str) -> Parameters:
        """Return the map of that side: of the target the projection to unit length, where it has no map of its own."""
        if side == "source":
            return self.parameters
        if side == "target":
            return unit_length(self.dim) if self.target_parameters is None else self.target_parameters
        raise ValueError(f"side must be 'source' or 'target', got {side!r}")

    def check(self, x: Any, *, side: Side = "source", num_threads: int | None = None) -> Drift:
        """Measure whether rows still come from the distribution that this was fitted on; bad rows are left out.

        Parameters
        ----------
        x
            `(..., dim)` array or tensor, or `Moments` gathered from a stream.
        side
            Which of the two sets they are compared with.
        num_threads
            As `transform`.

        Raises
        ------
        ValueError
            If no usable row is among them, or their dimension is another.
        """
        if side not in ("source", "target"):
            raise ValueError(f"side must be 'source' or 'target', got {side!r}")
        if isinstance(x, Moments):
            moments = x
        else:
            moments = Moments(self.dim).update(x, on_bad_rows="skip", num_threads=num_threads)
        if moments.dim != self.dim or moments.count == 0:
            raise ValueError(f"x must hold usable rows of dimension {self.dim}, got {moments!r}")
        fitted = self.source if side == "source" else self.target
        distance = float(np.linalg.norm(moments.mean - fitted.mean))
        return Drift(moments.count, distance, _noise_floor((fitted.trace, moments.count), (fitted.trace, fitted.count)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file of float64, whole or not at all; equal alignments give equal bytes."""
        tensors = {
            "scale": np.array([self.parameters.scale]),
            "shift": self.shift,
            "correction": self.correction,
            "source_mean": self.source.mean,
            "target_mean": self.target.mean,
        }
        fields: dict[str, Any] = {
            "method": self.method,
            "source": _statistics_fields(self.source),
            "target": _statistics_fields(self.target),
            "report": self.report,
            "fingerprints": self.fingerprints,
            "encoder": self.encoder,
        }
        more = _more_tensors(self)
        if not more and not self.parameters.noise_std:
            return _files.save(path, "alignment", tensors, fields)
        fields["noise_std"] = self.parameters.noise_std
        _files.save(path, "alignment", tensors | more, fields, version=2)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Alignment:
        """Read what `save` wrote.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it is damaged, holds something else, or comes from a newer format.
        """
        vector = (np.dtype(np.float64), 1)
        names = ("scale", "shift", "correction", "source_mean", "target_mean")
        matrix = (np.dtype(np.float64), 2)
        more = {name: matrix if name.endswith("matrix") else vector for name in _MORE_TENSORS}
        tensors, fields = _files.load(path, "alignment", dict.fromkeys(names, vector), optional=more)
        dim = tensors["shift"].size
        for name in names:
            expected = 1 if name == "scale" else dim
            if tensors[name].size != expected or dim == 0:
                raise ValueError(f"{path}: tensor {name!r} must have {expected} elements, got {tensors[name].size}")
        for name in _MORE_TENSORS & tensors.keys():
            wanted = (dim, dim) if name.endswith("matrix") else (dim,)
            if tensors[name].shape != wanted:
                raise ValueError(f"{path}: tensor {name!r} must have shape {wanted}, got {tensors[name].shape}")
        if (method := str(fields.get("method"))) not in METHODS:
            raise ValueError(f"{path} was fitted by method {method!r}, which this package does not know: upgrade it")
        try:
            noise_std = float(fields.get("noise_std", 0))
            if not (0 <= noise_std < np.inf):
                raise ValueError(f"noise_std is {noise_std}")
            return cls(
                method,
                Parameters(
                    float(tensors["scale"][0]),
                    frozen(tensors["shift"]),
                    frozen(tensors["correction"]),
                    _affine_of(tensors, ""),
                    noise_std,
                ),
                _statistics(fields["source"], tensors["source_mean"]),
                _statistics(fields["target"], tensors["target_mean"]),
                dict(fields["report"]),
                {str(name): str(value) for name, value in fields["fingerprints"].items()},
                None if fields["encoder"] is None else str(fields["encoder"]),
                _target_of(tensors),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: its header is damaged: {error!r}") from error


def fit(
    text: Any,
    image: Any,
    *,
    method: str = "realign",
    on_bad_rows: OnBadRows = "raise",
    backend: str = "auto",
    num_threads: int | None = None,
    key: str | None = None,
    text_column: str | None = None,
    image_column: str | None = None,
    limit: int | None = None,
    encoder: str | None = None,
    progress: bool = False,
    ranks: Ranks = ALONE,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> Alignment:
    """Fit an alignment of `text` (the source) to `image` (the target), from unpaired sets.

    Reads the images once and the text once, once more for "realign" and once more for each of its refinements.

    Parameters
    ----------
    text, image
        Each one an array or tensor `(..., dim)`, a path, glob, directory or list of paths, or an object that can be
        iterated over again and again and gives batches (arrays, tensors, or dicts of which `key` names the rows).
    method
        "anchor", the mean shift; "anchor_trace"; "realign", both and the centroid; "c3", the mean shift and noise;
        "center", each side less its own mean, for search; "whiten", each side whitened; "debias", without the
        directions in which the text varies most; and maps that match covariances: "coral", "bca", "ot".
    on_bad_rows
        What becomes of rows with NaN, infinity or norm zero: "raise"; "skip" leaves them out; "zero" counts them as
        zero vectors.
    backend
        "auto", where the rows lie: sets of which one is a tensor on a GPU are read there; or "cpu"; or "triton", which
        brings files and arrays to the GPU, copying while it computes. There, bad rows are reported after the read.
    num_threads
        By default the cores this process may use.
    text_column, image_column
        Name of the embeddings in files with several columns; by default "embedding" ("embed" in pickles, the only
        ".npy" of a sample in tars).
    limit
        Read at most so many rows of each side.
    encoder
        Which encoder made the embeddings; kept in the file. By default the one that `realign_fast.encode` has named in
        the folders of the embeddings, if it made them.
    progress
        Show progress on stderr.
    ranks
        The processes that divide the files between them: all call this alike, and all get the same.
    output
        File to write the alignment to. Of sets that are files, read by the CPU, what has been read is kept beside it in
        `.NAME.partial`, every half minute, until the alignment is written.
    resume
        Go on from what was kept of the same fit, by any number of processes, if anything was. The result has the same
        bytes; those of a covariance, the same with as many processes and threads.
    **options
        Of the method. `refine`, of all with a centroid step ("realign", "coral", "bca", "ot", "debias"): Newton steps
        on the centroid gap that is left in the sample. `sigma` of "c3": the noise of an element. `shrinkage` of
        "whiten", "coral", "bca" and "ot": the weight of the identity in the covariances, a number in [0, 1],
        "ledoit_wolf" or "oas", or None. `strength` of "ot": from 0, the trace scale, to 1, the whole transport, or
        "auto" (the default), which chooses it, and the shrinkage with it, from rows of both sets. `kind` of
        "whiten": "zca", "pca" or "cholesky". `energy` of "bca": the share of variance in its first block. `k` of
        "debias": how many directions.

    Returns
    -------
    Alignment
        Its `report` holds, under "text" and "image", `rows`, `bad_rows`, `trace`; under "gap" the distance of the
        centroids over all rows, "before" and after each step that a read has measured; under "in_sample" and
        "held_out" the same for every step, measured on a sample chosen by row content, for a map fitted on nine
        tenths of it, on these and on the last tenth; beside them `noise_floor`, the distance expected between two
        samples of these sizes from one distribution. Both are None where the sample has fewer than 20 rows a side.

    Raises
    ------
    ValueError
        If the dimensions differ, a set has fewer than 2 usable rows or equal rows only, an option is unknown, or
        different encoders made the embeddings.
    TypeError
        If a set can be read only once and the method needs more.
    BadRowsError
        A ValueError naming file and row, under "raise".
    OSError
        If a file cannot be read.
    """
    solver = get_method(method, options)
    check_on_bad_rows(on_bad_rows)
    text_source = open_source(text, name="text", key=key, column=text_column, side="source", num_threads=num_threads)
    image_source = open_source(
        image, name="image", key=key, column=image_column, side="target", num_threads=num_threads
    )
    _check_readable(text_source, solver, method)
    sources = {"image": image_source, "text": text_source}
    encoder = encoder or _encoder_of(text_source, image_source)
    job = {
        "command": "fit",
        "method": method,
        "options": options,
        "on_bad_rows": on_bad_rows,
        "text_column": text_column,
        "image_column": image_column,
        "limit": limit,
        "encoder": encoder,
    }
    checkpoint = _checkpoint_for(output, job, sources, ranks, resume)
    reader = reader_for(
        backend,
        tuple(sources.values()),
        on_bad_rows,
        num_threads,
        limit=limit,
        progress=progress,
        num_reads=_num_reads(solver, options),
        ranks=ranks,
        checkpoint=checkpoint,
    )
    with nullcontext() if checkpoint is None else checkpoint.keeping():
        alignment = fit_sources(text_source, image_source, reader, method, options, num_threads, encoder, ranks)
        if not ranks.first:
            return alignment
        if checkpoint is not None and output is not None:
            alignment.save(output)
            checkpoint.remove()
    return ranks.broadcast(alignment)


def _encoder_of(*sources: Source) -> str | None:
    """Return which encoder made the embeddings, where their folders say it."""
    found: dict[str, str] = {}
    for source in sources:
        for folder in sorted(source.folders()):
            name = encoder_in(folder)
            if name is not None:
                found.setdefault(name, f"{source.name} {folder} of {name!r}")
    if len(found) > 1:
        raise ValueError(f"expected embeddings of one encoder, got {', '.join(found.values())}")
    return next(iter(found), None)


def _checkpoint_for(
    output: str | os.PathLike[str] | None,
    job: Mapping[str, Any],
    sources: Mapping[str, Source],
    ranks: Ranks,
    resume: bool,
) -> Checkpoint | None:
    if output is None:
        if resume:
            raise ValueError("resume needs an output, beside which what has been read is kept")
        return None
    return Checkpoint(output, job, sources, ranks, resume=resume)


def _num_reads(solver: Method, options: Mapping[str, Any]) -> int:
    """Return how many reads of whole sets a fit takes, at most."""
    refine = options.get("refine", 0)
    return 2 + (1 + refine if solver.reads_again and isinstance(refine, int) else 0)


def fit_sources(
    text_source: Source,
    image_source: Source,
    reader: Reader,
    method: str,
    options: Mapping[str, Any],
    num_threads: int | None = None,
    encoder: str | None = None,
    ranks: Ranks = ALONE,
    held_out: bool = True,
) -> Alignment:
    """Fit to sources that `reader` reads; parameters and errors as `fit`. In the first process, before the others.

    `held_out` fits to nine tenths of the sample too, for the report.
    """
    solver = get_method(method, dict(options))
    check_dims(text_source, image_source)
    target, image_sample = reader.moments_and_sample(image_source, solver.covariances)
    source, text_sample = reader.moments_and_sample(text_source, solver.covariances)
    if isinstance(reader, RanksReader) and not ranks.first:
        found: Alignment = reader.follow(text_source)
        return found
    check_sets(source, target)
    text_part, image_part = _Part.whole(text_sample), _Part.whole(image_sample)
    moments_of = partial(reader.transformed_moments, text_source)
    solution = solver.solve(_Problem(source, target, moments_of, text_part, image_part, num_threads), **options)
    report = _report(method, options, source, target, solution)
    if solution.selection:
        report["selection"] = solution.selection
    if held_out:
        report |= _sample_report(solver, dict(options) | solution.chosen, text_part, image_part, num_threads)
    prints = {"text": text_source.fingerprint(), "image": image_source.fingerprint()}
    fingerprints = {name: value for name, value in prints.items() if value is not None}
    return _alignment(method, solution, source, target, report, fingerprints, encoder)


def fit_from_moments(
    text_moments: Moments,
    image_moments: Moments,
    *,
    text: Any = None,
    method: str = "realign",
    on_bad_rows: OnBadRows = "raise",
    backend: str = "auto",
    num_threads: int | None = None,
    key: str | None = None,
    text_column: str | None = None,
    encoder: str | None = None,
    progress: bool = False,
    **options: Any,
) -> Alignment:
    """Fit an alignment from statistics gathered elsewhere, on other machines or other days.

    Parameters that are not explained here, the result and the errors are those of `fit`; the report has no "in_sample"
    and "held_out".

    Parameters
    ----------
    text_moments, image_moments
        Of the two sets.
    text
        The rows that `text_moments` count, in any of the forms of `fit`; needed by methods that read the text again
        ("realign").
    """
    solver = get_method(method, options)
    check_on_bad_rows(on_bad_rows)
    check_has_kernels(backend, "a fit")  # also where nothing will be read
    check_sets(text_moments, image_moments)
    sample = Sample(text_moments.dim, "float32", None)
    fingerprints = {}

    def moments_of(parameters: Parameters) -> Moments:
        raise AssertionError("this method does not read the text")

    if solver.reads_again:
        if text is None:
            raise ValueError(f"method {method!r} reads the text rows again: pass text= beside the moments")
        source = open_source(text, name="text", key=key, column=text_column, side="source", num_threads=num_threads)
        _check_readable(source, solver, method)
        check_dims(source, image_moments)
        reader = reader_for(backend, (source,), on_bad_rows, num_threads, progress=progress)
        moments_of = partial(reader.transformed_moments, source)
        if options.get("refine"):
            _, sample = reader.moments_and_sample(source)
        if (value := source.fingerprint()) is not None:
            fingerprints["text"] = value
    part = _Part.whole(sample)
    no_part = _Part.whole(Sample(image_moments.dim, "float32", None))
    problem = _Problem(text_moments, image_moments, moments_of, part, no_part, num_threads)
    solution = solver.solve(problem, **options)
    report = _report(method, options, text_moments, image_moments, solution) | {"in_sample": None, "held_out": None}
    return _alignment(method, solution, text_moments, image_moments, report, fingerprints, encoder)


def apply_files(
    alignment: Alignment,
    text: Any,
    out_dir: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    format: str = "same",  # noqa: A002 (the name of the command's flag)
    side: Side = "source",
    on_bad_rows: Literal["raise", "zero"] = "raise",
    backend: str = "auto",
    column: str | None = None,
    id_column: str = "id",
    resume: bool = False,
    overwrite: bool = False,
    num_threads: int | None = None,
    noise_std: float | None = None,
    seed: int = 0,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Map every file of `text` into `out_dir`: same names, same row order, ids and other columns kept.

    Each file is written whole or not at all, and `realign-manifest.json` lists what is finished.

    Parameters
    ----------
    alignment
        A fitted one.
    text
        A path, glob, directory or list of paths.
    out_dir
        Made if missing.
    dtype
        Of the embeddings written; by default that of the input.
    format
        "same", "npy", "parquet", "safetensors" or "pickle".
    side, on_bad_rows, num_threads, noise_std, seed
        As in `Alignment.transform`. A row's number is its number in the file, and 2**40 for each file before that.
    backend
        "auto" or "cpu", the C++ kernels; or "triton", which brings the rows to a GPU and back.
    column, id_column
        Names of the columns in files that have several.
    resume, overwrite
        What to do with an output folder that is not empty: go on where an earlier run ended, or start again.
    progress
        Show progress on stderr.
    ranks
        The processes that divide the files between them: all call this alike.

    Returns
    -------
    dict
        What was done: files, rows, bytes, bad rows, seconds.

    Raises
    ------
    OSError, ValueError
        As `io.writer.rewrite`.
    """
    from .io.writer import rewrite

    check_on_bad_rows(on_bad_rows, skip=False)
    paths = file_paths(text, side)
    parameters = alignment.parameters_of(side)
    noise = Noise.of(parameters.noise_std if noise_std is None else noise_std, seed, None, ())
    map_rows = _map_for(parameters, backend)

    def transform(rows: Rows, out: Rows, threads: int, number: int) -> tuple[int, int, int]:
        if rows.values.shape[1] != alignment.dim:
            raise ValueError(f"rows have dimension {rows.values.shape[1]}, the alignment has {alignment.dim}")
        bad = map_rows(rows, out, threads, noise and noise.of_rows(number, len(rows.values)))
        raise_if_bad(bad, on_bad_rows, "x")
        return bad

    job: dict[str, Any] = {"alignment": alignment.fingerprint, "side": side, "on_bad_rows": on_bad_rows}
    if noise is not None:
        job |= {"noise_std": noise.std, "seed": noise.seed}
    return rewrite(
        paths,
        out_dir,
        transform=transform,
        column=column,
        id_column=id_column,
        dtype=dtype,
        format=format,
        job=job,
        resume=resume,
        overwrite=overwrite,
        num_threads=num_threads,
        progress=partial(show_progress, f"apply{ranks.label}") if progress else None,
        ranks=ranks,
    )


def _map_for(parameters: Parameters, backend: str) -> Callable[[Rows, Rows, int, Noise | None], tuple[int, int, int]]:
    check_has_kernels(backend, "files")
    if backend != "triton":
        return lambda rows, out, threads, noise: transform_rows(Steps.of(parameters, noise), rows, out, threads)
    device = find_device()
    choose(backend, device)
    from ._gpu import DeviceTransform

    own = threading.local()  # files are rewritten by several threads

    def map_rows(rows: Rows, out: Rows, threads: int, noise: Noise | None) -> tuple[int, int, int]:
        choose(backend, device, (rows.dtype, out.dtype))
        if not hasattr(own, "transform"):
            own.transform = DeviceTransform(parameters, device, threads)
        bad: tuple[int, int, int] = own.transform(rows, out, threads, noise)
        return bad

    return map_rows


def gather_moments(
    data: Any,
    *,
    name: str = "data",
    on_bad_rows: OnBadRows = "raise",
    backend: str = "auto",
    num_threads: int | None = None,
    key: str | None = None,
    column: str | None = None,
    limit: int | None = None,
    progress: bool = False,
    covariance: bool = False,
    precision: Precision = "high",
    ranks: Ranks = ALONE,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Moments:
    """Return the moments of everything in `data`, in any of the forms that `fit` takes.

    `covariance` and `precision` are those of `Moments`, `ranks`, `output` and `resume` as in `fit`. What is written to
    `output` must have rows.
    """
    source = open_source(data, name=name, key=key, column=column, num_threads=num_threads)
    job = {
        "command": "stats",
        "on_bad_rows": on_bad_rows,
        "column": column,
        "limit": limit,
        "covariance": covariance,
        "precision": precision,
    }
    checkpoint = _checkpoint_for(output, job, {name: source}, ranks, resume)
    options: dict[str, Any] = {"limit": limit, "progress": progress, "ranks": ranks, "checkpoint": checkpoint}
    reader = reader_for(backend, (source,), on_bad_rows, num_threads, **options)
    with nullcontext() if checkpoint is None else checkpoint.keeping():
        moments = reader.moments(source, covariance, precision)
        if checkpoint is not None and output is not None:
            if moments.count == 0:
                raise ValueError(f"{data} has no rows to count")
            if ranks.first:
                moments.save(output)
                checkpoint.remove()
    return moments


class _Part(Source):
    """Some rows of a sample, in the order of its ranking."""

    name = "sample"

    def __init__(self, sample: Sample, numbers: NDArray[np.intp]) -> None:
        self._sample, self._numbers = sample, numbers
        self.dim, self.dtype, self.num_rows = sample.dim, sample.dtype, len(numbers)

    @classmethod
    def whole(cls, sample: Sample) -> _Part:
        return cls(sample, sample.ranking())

    def __len__(self) -> int:
        return len(self._numbers)

    def split(self, every: int) -> tuple[_Part, _Part]:
        """Return all but each `every`-th row, and each `every`-th."""
        chosen = np.arange(len(self)) % every == every - 1
        return _Part(self._sample, self._numbers[~chosen]), _Part(self._sample, self._numbers[chosen])

    def first(self, num_rows: int) -> Rows:
        return self._sample.take(self._numbers[:num_rows])

    def batches(self, limit: int | None = None, done: Done | None = None) -> Iterator[Batch]:
        numbers = np.sort(self._numbers[:limit])  # sums do not ask for an order: that of the memory is the fastest
        for start in range(0, len(numbers), _PART_ROWS):
            yield Batch(self._sample.take(numbers[start : start + _PART_ROWS]), "sample", start)


class _Problem:
    """The source rows as a solver sees them, be they files or part of the sample."""

    def __init__(
        self,
        source: Moments,
        target: Moments,
        moments_of: Callable[[Parameters], Moments],
        sample: _Part,
        target_sample: _Part,
        num_threads: int | None,
    ) -> None:
        self.source, self.target = source, target
        self.names = "text", "image"
        self.moments_of = moments_of
        self._sample, self._target_sample = sample, target_sample
        self._num_threads = num_threads

    def mean_of(self, parameters: Parameters) -> NDArray[np.float64]:
        mapped = self.moments_of(parameters)
        if (mapped.count, mapped.num_zero) != (self.source.count, self.source.num_zero):
            raise ValueError(
                f"text gave {self.source.count} rows when first read and {mapped.count} now: "
                "it must give the same rows each time it is read"
            )
        return mapped.mean

    def newton_step(self, parameters: Parameters, residual: NDArray[np.float64]) -> NDArray[np.float64]:
        """Solve `E[(I - out out^T) / ||v + b||] step = residual` by conjugate gradients on rows of the sample.

        Plain loops (einsum), not BLAS: the same bits on any number of threads.
        """
        rows = self._sample.first(_NEWTON_ROWS)
        out = np.empty(rows.values.shape, np.float32)
        uncorrected = replace(parameters, correction=np.zeros_like(parameters.correction))
        transform_rows(Steps.of(uncorrected), rows, Rows(out, "float32"), self._num_threads)
        out += parameters.correction.astype(np.float32)
        norms = np.sqrt(np.einsum("ij,ij->i", out, out))
        out /= norms[:, None]
        weights = 1 / norms
        mean_weight = float(weights.mean(dtype=np.float64))
        weights /= np.float32(len(out))

        step = np.zeros_like(residual)
        rest = residual.copy()
        direction = rest.copy()
        size = float(rest @ rest)
        for _ in range(min(self.source.dim, 100)):
            along = np.einsum("ij,j->i", out, direction.astype(np.float32))
            image = mean_weight * direction - np.einsum("ij,i->j", out, along * weights)
            curvature = float(direction @ image)
            if curvature <= 1e-6 * float(direction @ direction):
                break  # no change of the correction moves the mean along here
            length = size / curvature
            step += length * direction
            rest -= length * image
            previous, size = size, float(rest @ rest)
            if size <= 1e-10 * float(residual @ residual):
                break
            direction = rest + size / previous * direction
        return step

    def samples(self, num_rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return at most so many unit rows of each set, `(n, dim)` and `(m, dim)`, in the order of their ranking."""
        unit = []
        for name, part in zip(self.names, (self._sample, self._target_sample), strict=True):
            if len(part) < 2:
                raise ValueError(f"this needs rows of both sets, not their moments alone, and there are none of {name}")
            rows = part.first(num_rows)
            unit.append(np.empty(rows.values.shape, np.float32))
            transform_rows(Steps.of(unit_length(part.dim)), rows, Rows(unit[-1], "float32"), self._num_threads)
        return unit[0], unit[1]


def _check_readable(source: Source, solver: Method, method: str) -> None:
    if solver.reads_again and not source.reiterable:
        raise TypeError(
            f"{source.name} can be read only once, and method {method!r} reads it again: pass an array, paths, a list "
            "of batches, or an object whose __iter__ starts anew each time"
        )


def check_dims(text: Source, image: Source | Moments) -> None:
    """Raise ValueError where the dimensions differ."""
    if text.dim != image.dim:
        raise ValueError(f"text has dimension {text.dim}, image has dimension {image.dim}")


def _report(
    method: str, options: Mapping[str, Any], source: Moments, target: Moments, solution: Solution
) -> dict[str, Any]:
    before = float(np.linalg.norm(source.mean - target.mean))
    sets = {
        name: {"rows": moments.count, "bad_rows": moments.num_zero + moments.num_skipped, "trace": moments.trace}
        for name, moments in (("text", source), ("image", target))
    }
    return {
        "method": method,
        "options": dict(options) | solution.chosen,
        **sets,
        "gap": {"before": before, **solution.gaps},
    }


def _sample_report(
    solver: Method, options: Mapping[str, Any], text: _Part, image: _Part, num_threads: int | None
) -> dict[str, Any]:
    nothing: dict[str, Any] = {"in_sample": None, "held_out": None}
    if min(len(text), len(image)) < 2 * _HELD_OUT_EVERY:
        return nothing
    (text_in, text_out), (image_in, image_out) = text.split(_HELD_OUT_EVERY), image.split(_HELD_OUT_EVERY)
    problem = _of_parts(text_in, image_in, solver.covariances, num_threads)
    try:
        check_sets(problem.source, problem.target)
    except ValueError:
        return nothing
    try:
        solution = solver.solve(problem, **options)
    except ValueError:  # nine tenths may be too few where all are enough
        return nothing
    held_out = _of_parts(text_out, image_out, False, num_threads)
    return {
        "in_sample": _gaps(solution, problem),
        "held_out": _gaps(solution, held_out),
    }


def _of_parts(text: _Part, image: _Part, covariances: bool, num_threads: int | None) -> _Problem:
    reader = Reader("raise", num_threads)
    moments_of = partial(reader.transformed_moments, text)
    source, target = reader.moments(text, covariances), reader.moments(image, covariances)
    return _Problem(source, target, moments_of, text, image, num_threads)


def _gaps(solution: Solution, problem: _Problem) -> dict[str, Any]:
    target = problem.target
    gap = {"before": float(np.linalg.norm(problem.source.mean - target.mean))}
    mapped = problem.source
    for step, parameters in solution.steps.items():
        mapped = problem.moments_of(parameters)
        gap[step] = float(np.linalg.norm(mapped.mean - target.mean))
    floor = _noise_floor((mapped.trace, mapped.count), (target.trace, target.count))
    return {"rows": {"text": mapped.count, "image": target.count}, "gap": gap, "noise_floor": floor}


def _noise_floor(*samples: tuple[float, int]) -> float:
    return float(np.sqrt(sum(trace / count for trace, count in samples)))


def _alignment(
    method: str,
    solution: Solution,
    source: Moments,
    target: Moments,
    report: dict[str, Any],
    fingerprints: dict[str, str],
    encoder: str | None,
) -> Alignment:
    return Alignment(
        method,
        _frozen_parameters(solution.parameters),
        SetStatistics.of(source),
        SetStatistics.of(target),
        report,
        fingerprints,
        encoder,
        solution.target and _frozen_parameters(solution.target),
    )


def _frozen_parameters(found: Parameters) -> Parameters:
    step = found.affine
    if step is not None:
        step = Affine(frozen(step.matrix), frozen(step.centre), frozen(step.offset))
    return Parameters(found.scale, frozen(found.shift), frozen(found.correction), step, found.noise_std)


# What a file of format version 2 may hold beside those of version 1: the matrix of a map and the centre it was computed
# about, and the map of target rows, `pi(matrix u + shift)`.
_MORE_TENSORS = {"matrix", "centre", "target_matrix", "target_centre", "target_shift"}


def _more_tensors(alignment: Alignment) -> dict[str, NDArray[np.float64]]:
    tensors = {}
    target = alignment.target_parameters
    if target is not None:
        tensors["target_shift"] = target.shift
    for prefix, parameters in (("", alignment.parameters), ("target_", target)):
        if parameters is not None and parameters.affine is not None:
            tensors[f"{prefix}matrix"] = parameters.affine.matrix
            tensors[f"{prefix}centre"] = parameters.affine.centre
    return tensors


def _affine_of(tensors: Mapping[str, NDArray[np.float64]], prefix: str) -> Affine | None:
    if f"{prefix}matrix" not in tensors:
        return None
    names = (f"{prefix}matrix", f"{prefix}centre", f"{prefix}shift")
    return Affine(*(frozen(tensors[name]) for name in names))


def _target_of(tensors: Mapping[str, NDArray[np.float64]]) -> Parameters | None:
    if "target_shift" not in tensors:
        return None
    shift = frozen(tensors["target_shift"])
    return Parameters(1.0, shift, frozen(np.zeros_like(shift)), _affine_of(tensors, "target_"))


def _statistics_fields(statistics: SetStatistics) -> dict[str, Any]:
    return {name: getattr(statistics, name) for name in ("count", "num_zero", "num_skipped", "trace")}


def _statistics(fields: Mapping[str, Any], mean: NDArray[np.float64]) -> SetStatistics:
    count, num_zero, num_skipped = (int(fields[name]) for name in ("count", "num_zero", "num_skipped"))
    trace = float(fields["trace"])
    if not (count > 0 and 0 <= num_zero <= count and num_skipped >= 0 and 0 <= trace <= 1):
        raise ValueError(f"no statistics of a set: {dict(fields)}")
    return SetStatistics(count, num_zero, num_skipped, trace, frozen(mean))
