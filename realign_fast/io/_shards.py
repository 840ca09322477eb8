"""Shards of rows that no file held before: npy, with the ids of the rows beside each."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._dtypes import Rows
from .._stop import Stopped
from . import _manifest
from ._arrow import arrow_errors, import_pyarrow
from ._encoders import NpyEncoder
from ._id_order import IdOrder
from ._raw import Chunk
from ._sink import Sink
from .sources import SIDECAR
from .writer import begin, more_bytes, summary_of

_ID = "id"
_MAX_NAMED = 100


class ShardWriter:
    """Writes a folder of shards, one after the other; a killed job goes on with the shard that it was at.

    A context; it is left with an error where the job ends early.

    Parameters
    ----------
    out_dir
        Made if missing.
    inputs
        `name` and `fingerprint` of what each shard is made of.
    job
        What else decides the output: plain JSON values.
    shard_bytes
        Of a shard at most, about.
    resume, overwrite
        What to do with a folder that is not empty: go on where an earlier run ended, or start again.

    Attributes
    ----------
    finished : set of int
        The numbers of shards that an earlier run has written.

    Raises
    ------
    FileExistsError
        If the folder is not empty and neither `resume` nor `overwrite` is set.
    OSError
        If there is not enough space.
    ValueError
        If the job to resume was another one.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        inputs: list[dict[str, str]],
        job: dict[str, Any],
        shard_bytes: int,
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other")
        self._began = time.monotonic()
        self._folder = folder = Path(out_dir)
        self._inputs = inputs
        names = [item["name"] for item in inputs]
        paths = [self._paths(number) for number in range(len(inputs))]

        def num_bytes(finished: Collection[str]) -> int:
            left = [path for name, (path, _) in zip(names, paths, strict=True) if name not in finished]
            return more_bytes([shard_bytes] * len(left), left) if left else 0

        head = _manifest.new_head(job, inputs)
        outputs = {path.name for pair in paths for path in pair}
        self._journal = begin(folder, head, outputs, num_bytes, resume=resume, overwrite=overwrite)
        self.finished = {number for number, name in enumerate(names) if name in self._journal.entries}

    def _paths(self, number: int) -> tuple[Path, Path]:
        stem = f"embed_{number:05d}"
        return self._folder / f"{stem}.npy", self._folder / f"{stem}{SIDECAR}.parquet"

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Stopped):
            error.kept = f"finished files are kept in {self._folder}, go on with --resume"
        self._journal.close()

    def write(self, number: int, values: NDArray[Any], ids: list[Any], left_out: list[str]) -> None:
        """Write a shard: `values` `(n, dim)` float16 or float32, their ids, and in words what was left out of it."""
        sinks: list[Sink] = []
        path, sidecar = self._paths(number)
        dim, dtype = values.shape[1], values.dtype.name
        try:
            sinks.append(Sink(path))
            rows = Rows(np.ascontiguousarray(values), dtype)
            NpyEncoder(sinks[0], len(values), dim, dtype).write(rows, Chunk(rows, 0))
            sinks.append(Sink(sidecar))
            order = _write_ids(sinks[1], ids)
            self._journal.add(
                {
                    "input": self._inputs[number]["name"],
                    "rows": len(values),
                    "dim": dim,
                    "dtype": dtype,
                    "column": None,
                    "bad_rows": len(left_out),
                    "left_out": left_out,
                    "ids": {"column": _ID, "xxh64": order},
                    "sidecar": sinks[1].finish(),
                    **sinks[0].finish(),
                }
            )
        finally:
            for sink in sinks:
                sink.discard()  # what is finished stays

    def finish(self) -> dict[str, Any]:
        """Write the manifest; return what `summary_of` does, and `left_out`, the first of what was left out."""
        self._journal.finish()
        left_out = chain.from_iterable(entry["left_out"] for entry in self._journal.entries.values())
        found = list(islice(left_out, _MAX_NAMED))
        return {**summary_of(self._journal, len(self.finished), self._began), "left_out": found}


def _write_ids(sink: Sink, ids: list[Any]) -> list[str] | None:
    """Write a column of ids; return the hashes of their order."""
    pa = import_pyarrow(sink.path)
    from pyarrow import parquet

    with arrow_errors(pa, sink.path):
        table = pa.table({_ID: pa.array(ids)})
        parquet.write_table(table, pa.PythonFile(sink, mode="w"))
    order = IdOrder()
    order.update(ids)
    return order.hashes()
