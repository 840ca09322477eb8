"""One reader a file format, chosen by the name's suffix."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Protocol

from .._dtypes import Rows
from ._raw import Blocks, Chunk, Layout, read_layout

FORMATS = {
    ".npy": "npy",
    ".safetensors": "safetensors",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".pkl": "pickle",
    ".pickle": "pickle",
}


class Shard(Protocol):
    """One file of embeddings; opening it has checked its header against its size.

    Attributes
    ----------
    path : Path
    num_rows : int or None
        None where only reading tells (pickles).
    dim : int
        0 where not known: pickles, and tables of lists without rows.
    dtype : str
        One of `DTYPES`, empty where not known.
    decoded : bool
        Whether reading takes computing, not only copying: then it pays to work ahead.
    """

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def num_rows(self) -> int | None: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def decoded(self) -> bool: ...  # noqa: D102

    def chunks(self, blocks: Blocks, *, columns: bool = False) -> Generator[Chunk, None, None]:
        """Read the rows in order, into `blocks` or as views of memory of their own; with other columns if asked."""
        ...


def chunks_from(shard: Shard, blocks: Blocks, start: int) -> Generator[Chunk, None, None]:
    """Read the rows of `shard` from row `start` on; those before that lie as they are used are not even touched."""
    layout: Layout | None = getattr(shard, "layout", None)
    if layout is not None:
        yield from read_layout(shard.path, layout, blocks, start)
        return
    for chunk in shard.chunks(blocks):
        skipped = min(max(0, start - chunk.start), len(chunk.rows.values))
        if skipped < len(chunk.rows.values):
            yield Chunk(Rows(chunk.rows.values[skipped:], chunk.rows.dtype), chunk.start + skipped)


def format_of(path: Path) -> str | None:
    """Return the format that the suffix of `path` stands for, None for a suffix of something else."""
    return FORMATS.get(path.suffix.lower())


def open_shard(path: Path, column: str | None = None) -> Shard:
    """Open a file of embeddings and check its header.

    Parameters
    ----------
    path
        A `.npy`, `.safetensors`, `.parquet`, `.arrow` or `.pkl` file.
    column
        The column, tensor or key of the embeddings; by default "embedding", in pickles also "embed", in safetensors
        also the only 2-D float tensor.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is truncated, damaged, of another format, or holds no embeddings of a float dtype.
    ImportError
        If its format needs a package that is not installed.
    """
    match format_of(path):
        case "npy":
            from ._npy import NpyShard

            return NpyShard(path)
        case "safetensors":
            from ._safetensors import SafetensorsShard

            return SafetensorsShard(path, column)
        case "parquet":
            from ._arrow import ParquetShard

            return ParquetShard(path, column)
        case "arrow":
            from ._arrow import ArrowShard

            return ArrowShard(path, column)
        case "pickle":
            from ._pickles import PickleShard

            return PickleShard(path, column)
        case _:
            raise ValueError(f"{path}: the suffix {path.suffix!r} is unknown, expected one of {', '.join(FORMATS)}")
