"""Embeddings in Ray Data: statistics by aggregation, and fits to data sets that Ray reads.

To map a data set, hand `realign_fast.data.align(alignment)` to its `map_batches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

try:
    import ray.data
    from ray.data.aggregate import AggregateFnV2
    from ray.exceptions import RayTaskError
except ModuleNotFoundError as missing:
    raise ImportError("realign_fast.ray needs Ray Data: pip install 'realign-fast[ray]'") from missing

from ._checkpoint import Read
from ._columns import read_column
from ._errors import BadRowsError
from ._reader import Reader
from ._rows import as_rows, dtype_name
from ._sample import Sample
from .alignment import Alignment, fit_sources
from .io.sources import NOTHING, Batch, Done, Source, check_array
from .methods import Parameters, get_method
from .moments import Moments, OnBadRows, Precision

__all__ = ["MomentsAggregate", "fit", "moments"]

# Where Ray keeps the file of each row, if it was told to: `include_paths`.
_PATH_COLUMN = "path"
_RESULT = "found"


class _BlockSource(Source):
    """The embeddings of a block, where they lie."""

    dim, dtype = 0, ""  # where there are none

    def __init__(self, block: Any, column: str, set_name: str) -> None:
        where = f"{set_name}column {column!r}"
        try:
            self._parts = [check_array(x, where) for x in read_column(block, column)]
        except ValueError as error:
            raise ValueError(f"{set_name}{error}") from None
        self.num_rows: int = sum(x.size // x.shape[-1] for x in self._parts)
        self.name = f"{where}, block of {self.num_rows} rows"
        if self._parts:
            self.dim, self.dtype = self._parts[0].shape[-1], dtype_name(self._parts[0].dtype)

    def batches(self, limit: int | None = None, done: Done = NOTHING) -> Iterator[Batch]:
        start = 0
        for part in self._parts:
            rows = as_rows(part, name=self.name, dim=self.dim)
            yield Batch(rows, self.name, start)
            start += len(rows.values)


class _ReadAggregate(AggregateFnV2):  # type: ignore[type-arg]  # no generic class before Ray 2.47
    """What `read` finds in the embeddings of each block, merged."""

    def __init__(
        self, name: str, column: str, read: Callable[[_BlockSource], Any], *, set_name: str = "", on: str | None = None
    ) -> None:
        self._column, self._read, self._set_name = column, read, set_name
        super().__init__(name, lambda: None, on=on, ignore_nulls=True)

    def aggregate_block(self, block: Any) -> Any:
        """Return what is found in one block; None where it has no rows."""
        source = _BlockSource(block, self._column, self._set_name)
        if source.num_rows == 0:
            return None
        try:
            return self._read(source)
        except BadRowsError as error:
            raise error.moved(f"{source.name}{_file_of(block, error.row)}", 0) from None

    def combine(self, current_accumulator: Any, new: Any) -> Any:
        """Return both merged."""
        return current_accumulator.merge(new)


class MomentsAggregate(_ReadAggregate):
    """`Moments` of a column of embeddings, for `Dataset.aggregate` and for the groups of `Dataset.groupby`.

    Count, mean and trace have the same bits however Ray cuts the rows into blocks and in whatever order it merges
    them; covariances agree to 1e-7. Each task uses the cores that Ray has given it. The result is None where a data set
    has no rows.

    Parameters
    ----------
    column
        Holds lists or tensors of float16, float32 or float64.
    covariance, precision
        As `Moments`.
    on_bad_rows
        "raise", "skip" or "zero", as `Moments.update`.
    name
        Of the result; by default `moments(column)`.

    Examples
    --------
    >>> dataset.groupby("domain").aggregate(MomentsAggregate("embedding"))
    """

    def __init__(
        self,
        column: str = "embedding",
        *,
        covariance: bool = False,
        precision: Precision = "high",
        on_bad_rows: OnBadRows = "raise",
        name: str | None = None,
    ) -> None:
        read = partial(Reader(on_bad_rows).moments, covariance=covariance, precision=precision)
        super().__init__(name or f"moments({column})", column, read, on=column)


def moments(
    dataset: Any,
    column: str = "embedding",
    *,
    covariance: bool = False,
    precision: Precision = "high",
    on_bad_rows: OnBadRows = "raise",
) -> Moments:
    """Return the moments of a column of a data set, read once, in tasks of Ray.

    Parameters
    ----------
    dataset
        A `ray.data.Dataset`.
    column, covariance, precision, on_bad_rows
        As `MomentsAggregate`.

    Raises
    ------
    BadRowsError
        A ValueError: under "raise", naming the column, the first bad row of a block, and its file where the data set
        has the column "path" (`include_paths=True`).
    TypeError, ValueError
        If it is no data set, or has no rows or no such column, or that holds something else.
    """
    read = partial(Reader(on_bad_rows).moments, covariance=covariance, precision=precision)
    found: Moments | None = _aggregated(_selected(dataset, column, "dataset"), _ReadAggregate(_RESULT, column, read))
    if found is None:
        raise ValueError("dataset has no rows")
    return found


def fit(
    text: Any,
    image: Any,
    *,
    column: str = "embedding",
    text_column: str | None = None,
    image_column: str | None = None,
    method: str = "realign",
    on_bad_rows: OnBadRows = "raise",
    encoder: str | None = None,
    **options: Any,
) -> Alignment:
    """Fit an alignment of one data set to another, as `realign_fast.fit`: the same rows give the same, to the last bit.

    Maps that match covariances agree as these do. Both are counted first, and where files do not state their rows,
    that is a read of its own; then the images are read once and the text once, once more for "realign" and once more
    for each of its refinements. Call `materialize()` before where rows are costly to make.

    Parameters
    ----------
    text, image
        Each a `ray.data.Dataset`, which must give the same rows each time it is read.
    column
        Holds lists or tensors of float16, float32 or float64, in both.
    text_column, image_column
        Of one of them, where it is another.
    method, on_bad_rows, encoder, **options
        As `realign_fast.fit`.

    Raises
    ------
    BadRowsError, TypeError, ValueError
        As `moments` and `realign_fast.fit`.
    """
    get_method(method, options)  # before anything is read
    reader = _DatasetReader(on_bad_rows)
    text_source = _DatasetSource(text, text_column or column, "text")
    image_source = _DatasetSource(image, image_column or column, "image")
    return fit_sources(text_source, image_source, reader, method, options, encoder=encoder)


class _DatasetSource(Source):
    """A column of a data set, which a `_DatasetReader` reads."""

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        self.name, self.column = name, column
        self.dataset = _selected(dataset, column, name)
        self.num_rows: int = dataset.count()
        if self.num_rows == 0:
            raise ValueError(f"{name} has no rows")
        first = next(self.batches(limit=1)).rows
        self.dim, self.dtype = first.values.shape[1], first.dtype

    def batches(self, limit: int | None = None, done: Done = NOTHING) -> Iterator[Batch]:
        dataset = self.dataset if limit is None else self.dataset.limit(limit)
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from _BlockSource(block, self.column, f"{self.name}, ").batches()


class _BlockReader(Reader):
    """Reads one block of many: its sample is what stays of it in that of all."""

    def __init__(self, on_bad_rows: OnBadRows, num_rows: int, dim: int, dtype: str) -> None:
        super().__init__(on_bad_rows)
        self._all_rows, self._kind = num_rows, (dim, dtype)

    def _new_sample(self, source: Source) -> Sample:
        return Sample(source.dim, source.dtype, self._all_rows)

    def _read(self, source: Source, read: Read, add: Callable[[Batch], None]) -> Read:
        if (source.dim, source.dtype) != self._kind:
            raise ValueError(
                f"{source.name} has dimension {source.dim} and dtype {source.dtype}, the first row of all has "
                f"{self._kind[0]} and {self._kind[1]}"
            )
        return super()._read(source, read, add)


@dataclass
class _Found:
    """What a read has found in some rows."""

    moments: Moments
    sample: Sample | None = None

    def merge(self, other: _Found) -> _Found:
        """Add what it has found in others."""
        self.moments.merge(other.moments)
        if self.sample is not None and other.sample is not None:
            self.sample.merge(other.sample)
        return self


class _DatasetReader(Reader):
    """Reads data sets in tasks of Ray, and adds up."""

    def moments_and_sample(self, source: Source, covariance: bool = False) -> tuple[Moments, Sample]:
        """Return the moments of all rows, and the sample of a reader that reads them one after the other."""

        def find(reader: Reader, block: Source) -> _Found:
            return _Found(*reader.moments_and_sample(block, covariance))

        found = self._find(source, find)
        return found.moments, cast(Sample, found.sample)

    def mapped(self, source: Source, parameters: Parameters) -> Moments:
        """Return what the tasks have found together."""
        return self._find(source, lambda reader, block: _Found(reader.mapped(block, parameters))).moments

    def _find(self, source: Source, find: Callable[[Reader, Source], _Found]) -> _Found:
        if not isinstance(source, _DatasetSource):
            raise TypeError(f"{source.name} is no data set of Ray")
        reader = _BlockReader(self._on_bad_rows, source.num_rows, source.dim, source.dtype)
        aggregate = _ReadAggregate(_RESULT, source.column, partial(find, reader), set_name=f"{source.name}, ")
        found: _Found | None = _aggregated(source.dataset, aggregate)
        num_rows = 0 if found is None else found.moments.count + found.moments.num_skipped
        if found is None or num_rows != source.num_rows:
            raise ValueError(
                f"{source.name} had {source.num_rows} rows when counted and gave {num_rows} now: it must give the same "
                "rows each time it is read, see Dataset.materialize"
            )
        return found


def _selected(dataset: Any, column: str, name: str) -> Any:
    """Return the data set with no more than the column and the files of its rows."""
    if not isinstance(dataset, ray.data.Dataset):
        raise TypeError(f"{name} must be a ray.data.Dataset, got {type(dataset).__name__}")
    columns = dataset.columns()
    if columns is None:
        raise ValueError(f"{name} has no rows")
    if column not in columns:
        raise ValueError(f"{name} has no column {column!r}; its columns are {columns}")
    wanted = [each for each in (column, _PATH_COLUMN) if each in columns]
    return dataset if len(wanted) == len(columns) else dataset.select_columns(wanted)


def _aggregated(dataset: Any, aggregate: _ReadAggregate) -> Any:
    """Return the result; what a task raises about the data comes without the frames of Ray's own code."""
    try:
        return dataset.aggregate(aggregate)[_RESULT]
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | TypeError):
            raise error.cause from None
        raise


def _file_of(block: Any, row: int) -> str:
    """Return the file from which Ray has read a row, in words, where it was asked to keep that."""
    names = block.schema.names if hasattr(block, "schema") else list(block.columns)
    if _PATH_COLUMN not in names:
        return ""
    return f" from {next(islice(iter(block[_PATH_COLUMN]), row, None))}"
