"""One reader a file format, chosen by the name's suffix."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, runtime_checkable

from .._dtypes import Rows, storage
from ._raw import Blocks, Chunk, Layout, read_layout
from ._remote import AT_ONCE, AnyPath, RemotePath, copy_to, naming

FORMATS = {
    ".npy": "npy",
    ".safetensors": "safetensors",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".pkl": "pickle",
    ".pickle": "pickle",
    ".tar": "tar",
}
_COMPRESSED_TARS = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Shard(Protocol):
    """One file of embeddings; opening it has checked its header against its size.

    Attributes
    ----------
    path : Path or RemotePath
    num_rows : int or None
        None where only reading tells (pickles and tars).
    dim : int
        0 where not known: pickles, and tables of lists without rows.
    dtype : str
        One of `DTYPES`, empty where not known.
    decoded : bool
        Whether reading takes computing or waiting, not only copying: then it pays to work ahead.
    """

    @property
    def path(self) -> AnyPath: ...  # noqa: D102
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


@runtime_checkable
class RangedShard(Shard, Protocol):
    """A file that can be remote.

    Attributes
    ----------
    ranges : list of (int, int)
        Which bytes `chunks` reads without other columns, in order: begin and end.
    """

    @property
    def ranges(self) -> list[tuple[int, int]]: ...  # noqa: D102


class CopiedShard:
    """One remote file of a format that is read as a whole: from a local copy, which lasts as long as the reading."""

    num_rows = None
    dim = 0
    dtype = ""
    decoded = True

    def __init__(self, path: RemotePath, column: str | None) -> None:
        self.path = path
        self._column = column
        self.ranges = [(0, path.size)]

    def chunks(self, blocks: Blocks, *, columns: bool = False) -> Generator[Chunk, None, None]:
        """Copy the file and read the copy."""
        with TemporaryDirectory(prefix="realign-") as folder:
            copy = Path(folder, self.path.name)
            with blocks.open(self.path) as remote:
                copy_to(remote, self.path, copy)
            try:
                yield from open_shard(copy, self._column).chunks(blocks, columns=columns)
            except ValueError as error:
                raise naming(error, self.path, copy) from error.__cause__


def chunks_from(shard: Shard, blocks: Blocks, start: int) -> Generator[Chunk, None, None]:
    """Read the rows of `shard` from row `start` on; those before that lie as they are used are not even touched."""
    layout: Layout | None = getattr(shard, "layout", None)
    if layout is not None:
        yield from read_layout(shard.path, layout, blocks, start)
        return
    for chunk in shard.chunks(blocks):
        skipped = min(max(0, start - chunk.start), len(chunk.rows.values))
        if skipped < len(chunk.rows.values):
            rows = Rows(chunk.rows.values[skipped:], chunk.rows.dtype)
            yield Chunk(rows, chunk.start + skipped, check=chunk.check)


def format_of(path: AnyPath) -> str | None:
    """Return the format that the suffix of `path` stands for, None for a suffix of something else."""
    return FORMATS.get(path.suffix.lower())


def open_shard(path: AnyPath, column: str | None = None) -> Shard:
    """Open a file of embeddings and check its header.

    Parameters
    ----------
    path
        A `.npy`, `.safetensors`, `.parquet`, `.arrow`, `.pkl` or `.tar` file, here or in a store.
    column
        The column, tensor or key of the embeddings; by default "embedding", in pickles also "embed", in safetensors
        also the only 2-D float tensor. In tars, the extension of their members; by default the only `.npy` of a sample.

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

            shard = NpyShard(path)
            return CopiedShard(path, column) if isinstance(path, RemotePath) and shard.layout.fortran else shard
        case "safetensors":
            from ._safetensors import SafetensorsShard

            return SafetensorsShard(path, column)
        case "parquet":
            from ._arrow import ParquetShard

            return ParquetShard(path, column)
        case "arrow" | "pickle" | "tar" if isinstance(path, RemotePath):
            return CopiedShard(path, column)
        case "arrow" if isinstance(path, Path):
            from ._arrow import ArrowShard

            return ArrowShard(path, column)
        case "pickle" if isinstance(path, Path):
            from ._pickles import PickleShard

            return PickleShard(path, column)
        case "tar" if isinstance(path, Path):
            from ._tar import TarShard

            return TarShard(path, column)
        case _:
            raise ValueError(unknown(path))


def open_shards(paths: list[AnyPath], column: str | None = None) -> list[Shard]:
    """Open files as `open_shard`; remote ones many at once, since each header is waited for."""
    if not any(isinstance(path, RemotePath) for path in paths):
        return [open_shard(path, column) for path in paths]
    with ThreadPoolExecutor(AT_ONCE, "realign-open") as pool:
        return list(pool.map(partial(open_shard, column=column), paths))


def plan(shards: Iterable[tuple[Shard, int]]) -> Iterator[tuple[RemotePath, int, int]]:
    """Yield which bytes of remote files `chunks_from` will read, in order, given the first row of each."""
    for shard, first in shards:
        if isinstance(shard, RangedShard) and isinstance(shard.path, RemotePath):
            layout: Layout | None = getattr(shard, "layout", None)
            skipped = first * layout.dim * storage(layout.dtype).itemsize if layout else 0
            for begin, end in shard.ranges:
                yield shard.path, begin + skipped, end


def is_compressed_tar(path: AnyPath) -> bool:
    """Return whether the suffix of `path` is one of compressed tars."""
    return path.name.lower().endswith(_COMPRESSED_TARS)


def unknown(path: AnyPath) -> str:
    """Return what to say of a file whose suffix stands for no format."""
    if is_compressed_tar(path):
        return f"{path}: compressed tars are not read: decompress it first"
    return f"{path}: the suffix {path.suffix!r} is unknown, expected one of {', '.join(FORMATS)}"
