"""Embeddings as a column of a batch, as data sets hand them out: dicts of arrays, pyarrow tables, pandas frames."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import numpy as np

from ._rows import is_tensor


def read_column(batch: Any, name: str) -> list[Any]:
    """Return the embeddings in column `name` as arrays or tensors `(..., dim)`, one after the other.

    Lists of numbers become float32 where they are Python's; what lies in arrow's memory is not copied.

    Raises
    ------
    ValueError
        If there is no such column, or its rows are missing or of different lengths.
    """
    if _is_instance(batch, "pyarrow", "Table", "RecordBatch"):
        from .io._arrow import embeddings_of

        _check_name(name, batch.schema.names)
        column = batch.column(name)
        arrays, start = [], 0
        for chunk in getattr(column, "chunks", [column]):
            if len(chunk):
                arrays.append(embeddings_of(f"column {name!r}", chunk, start))
                start += len(chunk)
        return arrays
    if _is_instance(batch, "pandas", "DataFrame"):
        _check_name(name, list(batch.columns))
        return [_stacked(batch[name].to_numpy(), name)] if len(batch) else []
    if not isinstance(batch, Mapping) or name not in batch:
        found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"expected a dict with {name!r}, got {found}")
    x = batch[name]
    if is_tensor(x):
        return [x]
    return [_stacked(x, name) if isinstance(x, np.ndarray) else np.asarray(x, np.float32)]


def map_column(batch: Any, name: str, function: Callable[[Any], Any]) -> Any:
    """Return the batch with what `function` makes of the embeddings in column `name`, and all else as it is.

    Raises
    ------
    ValueError
        As `read_column`.
    """
    mapped = [function(x) for x in read_column(batch, name)]
    if _is_instance(batch, "pyarrow", "Table", "RecordBatch"):
        from .io._arrow import like

        column = batch.column(name)
        chunks = getattr(column, "chunks", [column])
        arrays = [like(chunk, x) for chunk, x in zip([chunk for chunk in chunks if len(chunk)], mapped, strict=True)]
        place = batch.schema.get_field_index(name)
        if not arrays:
            return batch
        pa = sys.modules["pyarrow"]
        values = arrays[0] if column is chunks[0] else pa.chunked_array(arrays)
        return batch.set_column(place, batch.schema.field(place), values)
    if _is_instance(batch, "pandas", "DataFrame"):
        return batch.assign(**{name: list(mapped[0])}) if mapped else batch
    return {**batch, name: mapped[0]}


def _is_instance(x: object, module: str, *names: str) -> TypeGuard[Any]:
    """Return whether `x` is of a class of a module, without importing that."""
    found = sys.modules.get(module)
    return found is not None and isinstance(x, tuple(getattr(found, name) for name in names))


def _check_name(name: str, names: list[str]) -> None:
    if name not in names:
        raise ValueError(f"expected a column {name!r}, got {names}")


def _stacked(x: Any, name: str) -> Any:
    """Return rows that are objects, as tables make them of lists, as one array."""
    if x.dtype != object:
        return x
    rows = [row if isinstance(row, np.ndarray) else np.asarray(row, np.float32) for row in x]
    try:
        return np.stack(rows) if rows else x
    except ValueError:
        lengths = sorted({row.shape for row in rows})
        raise ValueError(f"column {name!r} must hold rows of one length, got shapes {lengths}") from None
