"""Rewrite files of embeddings: each output whole or absent, and a killed job goes on where it ended."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from collections import deque
from collections.abc import Callable, Collection, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from .._dtypes import Rows, storage, to_float64
from .._errors import BadRowsError
from .._native import _C
from .._os import O_PLAIN
from .._progress import progress as show_progress
from .._ranks import ALONE, Ranks
from .._rows import dtype_name
from .._stop import Stopped
from ..backends import count_threads
from . import _manifest
from ._encoders import Encoder, open_encoders, read
from ._fingerprint import fingerprint
from ._id_order import PICKLE_ID, IdOrder, id_name, id_problem, ids_of
from ._manifest import Entry, Journal, Manifest, Start
from ._pickles import PickleShard
from ._prefetch import prefetch
from ._raw import Blocks, Chunk
from ._remote import AnyPath, FetchAhead, RemotePath, copy_to, naming, size_of
from ._sink import Sink
from ._tar import LoadedTar, TarShard
from .formats import Shard, format_of, open_shard, unknown
from .sources import BATCH_BYTES, MANIFEST, SIDECAR, count_rows, file_paths

Transform = Callable[[Rows, Rows, int, int], tuple[int, int, int]]
ShowProgress = Callable[[int | None, int], AbstractContextManager[Callable[[int], None]]]

_DEPTH = 3  # blocks in flight on either side of the transform
_MAX_UNSYNCED_FILES = 4
# Files at work at once, since one is written by a single thread: of formats that hold little in memory.
_MAX_LANES = 4
_RAW = frozenset(("npy", "safetensors"))
_NORM_TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5, "float64": 1e-5}
_SUFFIXES = {"npy": ".npy", "safetensors": ".safetensors", "parquet": ".parquet", "arrow": ".arrow", "pickle": ".pkl"}


def rewrite(
    paths: list[AnyPath],
    out_dir: str | os.PathLike[str],
    *,
    transform: Transform,
    column: str | None = None,
    id_column: str = "id",
    dtype: str | None = None,
    format: str = "same",  # noqa: A002 (the name of the command's flag)
    job: dict[str, Any],
    unit_norm: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    num_threads: int | None = None,
    progress: ShowProgress | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Put the rows of every file through `transform` and write them under the same names into `out_dir`.

    Row order, ids, other columns, other tensors and metadata are kept. What a format cannot hold goes beside the file,
    as the rest of the input in the input's format: `NAME.columns.SUFFIX` for tables and pickles that become npy or
    safetensors, and for other tensors of safetensors. Readers of folders know such files and leave them out.

    Tars stay as they are but for the embeddings. In other formats each key is an id, and the other members of a sample
    are columns named after their extensions: `.txt`, `.json` and `.cls` of text, others of bytes. Beside npy and
    safetensors these go into `NAME.columns.parquet`.

    In pickles ids lie under "id" and embeddings under "embed" (rows without ids get their number); in tables under
    `id_column` and `column`. Files that stay in their format keep their names. Lists in pickles become arrays.

    Parameters
    ----------
    paths
        Input files, of one dimension and dtype.
    out_dir
        Made if missing. Neither the folder of an input nor one above it.
    transform
        `transform(rows_in, rows_out, num_threads, number)` fills `rows_out`, contiguous and of the dtype to write, and
        returns `(num_zero, num_nonfinite, first_bad)` of its input, or raises `BadRowsError`. `number` is that of the
        first row: its number in the file, and 2**40 for each file before. Called from several threads.
    column, id_column
        Names of the embeddings (see `open_shard`) and of the ids.
    dtype
        Of the embeddings written; by default that of the input, or float32 for bfloat16 where the format has none.
    format
        "same", "npy", "safetensors", "parquet", "arrow" or "pickle".
    job
        What else decides the output, for the manifest and for `resume`: plain JSON values.
    unit_norm
        Whether `verify` shall expect rows of length one.
    resume
        Skip what an interrupted run of the same job has finished.
    overwrite
        Replace the files of an earlier job, one after the other. Files it does not know are left alone.
    num_threads
        That compute; by default the cores this process may use.
    progress
        `progress(num_rows, initial)` is a context that gives a function, which is told how many rows are done as they
        are: of `num_rows`, None where that is not known, of which `initial` were done before.
    ranks
        The processes that divide the files between them: all call this alike, and the first writes the manifest.

    Returns
    -------
    dict
        `files`, `rows`, `bytes`, `bad_rows` of all outputs, `skipped_files` of an earlier run, `seconds`, and `notes`.

    Raises
    ------
    FileExistsError
        If `out_dir` is not empty and neither `resume` nor `overwrite` is set.
    OSError
        If a file cannot be read or written; finished files stay valid and `resume` goes on.
    ValueError
        If an input is wrong, two would get one name, the folders overlap, or the job to resume was another one.
    """
    began = time.monotonic()
    folder = Path(out_dir)
    if dtype is not None:
        dtype = dtype_name(dtype)
    if format != "same" and format not in _SUFFIXES:
        raise ValueError(f"format must be same, {', '.join(_SUFFIXES)}, got {format!r}")
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    if not paths:
        raise ValueError("there are no files to rewrite")
    targets = _plan(paths, folder, format)
    if dtype == "bfloat16" and any(target.format != "safetensors" for target in targets):
        raise ValueError("only safetensors holds bfloat16: choose another dtype, or format='safetensors'")
    options = {"dtype": dtype, "format": format, "column": column, "id_column": id_column, "unit_norm": unit_norm}
    journal = _begin(targets, folder, {**job, **options}, resume, overwrite) if ranks.first else None
    start: Any = ranks.broadcast(journal and journal.start)
    journal = journal or Journal(folder, start, ranks.rank)
    finished = dict(journal.entries)
    try:
        left = [target for target in targets if target.source.name not in finished]
        mine = [left[i] for i in ranks.share([size_of(target.source) for target in left])]
        first = open_shard(left[0].source, column) if left else None
        with _showing(progress, mine, column, finished) as advance:
            run = _Run(mine, transform, column, id_column, dtype, journal, advance, first)
            run.do(count_threads(num_threads))
        of_all = ranks.gather((journal.entries, run.notes))
        for entries_of_one, _ in of_all:
            journal.entries |= entries_of_one
        if ranks.first:
            journal.finish()
    except Stopped as stopped:
        stopped.kept = f"finished files are kept in {folder}, go on with --resume"
        raise
    finally:
        journal.close()
    notes = sorted(set[str]().union(*(notes for _, notes in of_all)))
    return {**summary_of(journal, len(finished), began), "notes": notes}


def summary_of(journal: Journal, num_finished_before: int, began: float) -> dict[str, Any]:
    """Return what a job that began at `began` (of `time.monotonic`) has done; so many files were finished before."""
    entries = journal.entries.values()
    return {
        "files": len(entries),
        "skipped_files": num_finished_before,
        "rows": sum(entry["rows"] for entry in entries),
        "bytes": sum(output["size"] for entry in entries for output in _manifest.outputs_of(entry)),
        "bad_rows": sum(entry["bad_rows"] for entry in entries),
        "seconds": round(time.monotonic() - began, 3),
    }


def _showing(
    progress: ShowProgress | None, targets: list[_Target], column: str | None, finished: dict[str, Entry]
) -> AbstractContextManager[Callable[[int], None] | None]:
    """Show the progress of what this process does; what was done before counts where it does all."""
    if progress is None:
        return nullcontext()
    before = sum(entry["rows"] for entry in finished.values())
    num_rows = count_rows([target.source for target in targets], column)
    return progress(None if num_rows is None else before + num_rows, before)


def convert(
    data: Any,
    out_dir: str | os.PathLike[str],
    *,
    format: str,  # noqa: A002 (the name of the command's flag)
    column: str | None = None,
    id_column: str = "id",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the files of `data` (a path, glob, directory or list of paths) in another format, as `rewrite` does.

    Values stay as they are, bad rows too; bfloat16 becomes float32 where the format has no bfloat16.
    """
    return rewrite(
        file_paths(data),
        out_dir,
        transform=_copy,
        column=column,
        id_column=id_column,
        format=format,
        job={"command": "convert"},
        unit_norm=False,
        resume=resume,
        overwrite=overwrite,
        progress=partial(show_progress, "convert") if progress else None,
    )


def _copy(rows: Rows, out: Rows, num_threads: int, number: int) -> tuple[int, int, int]:
    if rows.bfloat16 and not out.bfloat16:
        np.left_shift(rows.values, 16, out=out.values.view(np.uint32), dtype=np.uint32)
    else:
        out.values[...] = rows.values
    return 0, 0, -1


class _Target(NamedTuple):
    source: AnyPath
    format: str
    path: Path
    sidecar: Path
    number: int  # among all inputs

    @property
    def names(self) -> tuple[str, str]:
        return self.path.name, self.sidecar.name


def _plan(paths: list[AnyPath], folder: Path, wanted: str) -> list[_Target]:
    """Return what becomes of each input; refuse folders that overlap and names that meet."""
    resolved = folder.resolve()
    targets = []
    taken: dict[str, AnyPath] = {}
    for number, path in enumerate(paths):
        for parent in {path.parent.resolve(), path.resolve().parent} if isinstance(path, Path) else ():
            if resolved == parent or resolved in parent.parents:
                raise ValueError(
                    f"{folder} is the folder of the input {path} or lies above it: choose another output folder"
                )
        found = format_of(path)
        if found is None:
            raise ValueError(unknown(path))
        name = path.name if wanted in ("same", found) else path.stem + _SUFFIXES[wanted]
        sidecar = folder / f"{path.stem}{SIDECAR}{'.parquet' if found == 'tar' else path.suffix}"
        target = _Target(path, found if wanted == "same" else wanted, folder / name, sidecar, number)
        for output in target.names:
            if output in taken:
                raise ValueError(f"{path} and {taken[output]} would both be written as {output}")
            taken[output] = path
        targets.append(target)
    return targets


def _begin(targets: list[_Target], folder: Path, job: dict[str, Any], resume: bool, overwrite: bool) -> Journal:
    inputs = [{"name": target.source.name, "fingerprint": fingerprint(target.source)} for target in targets]

    def num_bytes(finished: Collection[str]) -> int:
        left = [target for target in targets if target.source.name not in finished]
        return _num_bytes(left, job["column"], job["dtype"])

    names = {name for target in targets for name in target.names}
    return begin(folder, _manifest.new_head(job, inputs), names, num_bytes, resume=resume, overwrite=overwrite)


def begin(
    folder: Path,
    head: dict[str, Any],
    names: set[str],
    num_bytes: Callable[[Collection[str]], int],
    *,
    resume: bool,
    overwrite: bool,
) -> Journal:
    """Make the folder ready for a job, or for what is left of it.

    `names` are those of its files; `num_bytes`, told the names of the inputs that are finished, says about how many
    bytes those of the others need.
    """
    finished, former = _take_over(folder, head, resume=resume, overwrite=overwrite)
    _check_space(folder, num_bytes(finished))
    folder.mkdir(parents=True, exist_ok=True)
    _manifest.remove_temporaries(folder, names)
    return Journal(folder, Start(head, finished, former))


def _take_over(
    folder: Path, head: dict[str, Any], *, resume: bool, overwrite: bool
) -> tuple[dict[str, Entry], set[str]]:
    """Return the entries by input of what is finished, and the names of files that an earlier job has left."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "the output must be a folder", str(folder))
    if not folder.exists() or all(_manifest.is_temporary(path.name) for path in folder.iterdir()):
        return {}, set()
    if not resume and not overwrite:
        raise FileExistsError(
            f"{folder} is not empty: pass resume to go on with its job or overwrite to replace its files"
        )
    manifest = _manifest.load(folder)
    if overwrite:
        return {}, manifest.names() if manifest else set()
    if manifest is None:
        raise FileExistsError(
            f"{folder} is not empty, but holds no job to resume: pass overwrite or choose another folder"
        )
    _check_same_job(folder, manifest, head)
    finished = {
        name: entry
        for name, entry in manifest.files.items()
        if all(_has_size(folder / output["name"], output["size"]) for output in _manifest.outputs_of(entry))
    }
    return finished, manifest.names()


def _check_same_job(folder: Path, manifest: Manifest, head: dict[str, Any]) -> None:
    _manifest.check_same_job(str(folder), manifest.head["job"], json.loads(json.dumps(head["job"])))
    before = {item["name"]: item["fingerprint"] for item in manifest.head["inputs"]}
    now = {item["name"]: item["fingerprint"] for item in head["inputs"]}
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            change = "is new" if name not in before else "is gone" if name not in now else "has changed"
            raise ValueError(f"{folder} cannot be resumed: the input {name} {change}; pass overwrite to begin again")


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _num_bytes(targets: list[_Target], column: str | None, dtype: str | None) -> int:
    """Return about how many bytes more than now are taken at most while the outputs are written."""
    if not targets:
        return 0
    shard = open_shard(targets[0].source, column)
    old = storage(shard.dtype or "float32").itemsize
    new = (
        storage(dtype).itemsize
        if dtype
        else 4
        if shard.dtype == "bfloat16" and targets[0].format != "safetensors"
        else old
    )
    sizes = [size_of(target.source) * new // old for target in targets]
    copies = [target.source.size for target in targets if isinstance(target.source, RemotePath)]
    return more_bytes(sizes, [target.path for target in targets]) + max(copies, default=0)


def more_bytes(sizes: list[int], paths: list[Path]) -> int:
    """Return how many bytes more than now are taken at most while files of these sizes are put at `paths` in turn."""
    replaced = sum(path.stat().st_size for path in paths if path.is_file())
    return max(0, sum(sizes) - replaced) + max(sizes) if replaced else sum(sizes)


def _check_space(folder: Path, needed: int) -> None:
    """Raise OSError where so many bytes do not fit on the disk."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"not enough space: about {needed:,} bytes are needed, {free:,} are free", str(folder)
        )


class _Output:
    """One file on its way through the threads."""

    def __init__(self, target: _Target, shard: Shard, rows: int, dim: int, dtype: str, id_column: str) -> None:
        self.target = target
        self.shard = shard
        self.num_rows, self.dim, self.dtype = rows, dim, dtype
        self.encoders: list[Encoder] = []
        self.sinks: list[Sink] = []
        self.rows_done = 0
        self.bad_rows = 0
        self._failed = False
        self._id_name = id_name(shard, id_column)
        self._ids = IdOrder()
        self._id_column = id_column

    def new_sink(self, path: Path) -> Sink:
        self.sinks.append(Sink(path))
        return self.sinks[-1]

    def write(self, rows: Rows, chunk: Chunk) -> None:
        try:
            for encoder in self.encoders:
                encoder.write(rows, chunk)
            if self._id_name is not None:
                self._ids.update(ids_of(chunk.columns, self._id_name))
        except BaseException:
            self._failed = True
            raise

    def close(self) -> bool:
        """Write what is left; return whether the file is whole."""
        if self._failed:
            return False
        for encoder in self.encoders:
            encoder.close()
        return True

    def finish(self) -> Entry:
        sidecar = self.sinks[1].finish() if len(self.sinks) > 1 else None
        return {
            "input": self.target.source.name,
            "rows": self.num_rows,
            "dim": self.dim,
            "dtype": self.dtype,
            "column": self.encoders[0].column,
            "bad_rows": self.bad_rows,
            "sidecar": sidecar,
            "ids": self._id_order(),
            **self.sinks[0].finish(),
        }

    def _id_order(self) -> dict[str, Any] | None:
        hashes = None if self._id_name is None else self._ids.hashes()
        if hashes is None:
            return None
        in_pickle = format_of(self.sinks[-1].path) == "pickle"
        return {"column": PICKLE_ID if in_pickle else self._id_column, "xxh64": hashes}

    def discard(self) -> None:
        for sink in self.sinks:
            sink.discard()


class _Run:
    """Files being rewritten, each by one of several lanes; what the lanes share."""

    def __init__(
        self,
        targets: list[_Target],
        transform: Transform,
        column: str | None,
        id_column: str,
        dtype: str | None,
        journal: Journal,
        progress: Callable[[int], None] | None,
        first: Shard | None,
    ) -> None:
        self.notes: set[str] = set()
        self.transform = transform
        self.column, self.id_column = column, id_column
        self._dtype = dtype
        self._targets = targets
        self._copies: dict[int, Path] = {}
        self._next = self._inputs()
        if any(isinstance(target.source, RemotePath) for target in targets):
            self._next = prefetch(self._next, 2)
        self._journal = journal
        self._progress = progress
        self.fingerprints = {item["name"]: item["fingerprint"] for item in journal.start.head["inputs"]}
        self._lock = Lock()
        # What the shapes of all are compared with, in other processes too.
        self._first = first if first is not None and first.dim else None
        self._unfinished: list[_Output] = []
        self._errors: dict[int, BaseException] = {}

    def do(self, num_threads: int) -> None:
        """Rewrite all files; raise the error of the first that failed, as a single lane would meet it."""
        num_lanes = 1
        if all(_RAW.issuperset((format_of(target.source), target.format)) for target in self._targets):
            num_lanes = max(1, min(num_threads, len(self._targets), _MAX_LANES))
        try:
            with ThreadPoolExecutor(1, "realign-sync") as syncer, ThreadPoolExecutor(num_lanes, "realign-file") as pool:
                try:
                    threads = num_threads // num_lanes
                    wait([pool.submit(_Lane(self, threads, syncer).work) for _ in range(num_lanes)])
                except BaseException as error:  # an interrupt
                    self._errors[-1] = error
            if self._errors:
                raise self._errors[min(self._errors)]
        finally:
            self._next.close()
            for unfinished in self._unfinished:
                unfinished.discard()
            for copy in self._copies.values():
                copy.unlink(missing_ok=True)

    def _inputs(self) -> Generator[tuple[int, _Target, Path], None, None]:
        """Yield each file, its number, and where it can be read: a remote one in a copy, made one ahead."""
        remote = [target.source for target in self._targets if isinstance(target.source, RemotePath)]
        with closing(FetchAhead((path, 0, path.size) for path in remote)) as ahead:
            for index, target in enumerate(self._targets):
                path = target.source
                if isinstance(path, RemotePath):
                    copy = self._copies[index] = target.path.parent / _manifest.copy_name(path.name)
                    with ahead.open(path) as file:
                        copy_to(file, path, copy)
                    path = copy
                yield index, target, path

    def next_file(self) -> tuple[int, _Target, Path] | None:
        """Return a file nobody works at, its number, and where it can be read."""
        with self._lock:
            return None if self._errors else next(self._next, None)

    def fail(self, index: int, error: BaseException) -> None:
        """Keep the error of file `index`; files before it are finished, those after it given up."""
        with self._lock:
            source, copy = self._targets[index].source, self._copies.get(index)
            if isinstance(source, RemotePath) and copy and isinstance(error, Exception):
                error = naming(error, source, copy)
            self._errors[index] = error

    def given_up(self, index: int) -> bool:
        """Return whether a file before `index` has failed."""
        return bool(self._errors) and min(tuple(self._errors)) < index

    def advance(self, num_rows: int) -> None:
        """Show that so many more rows are done."""
        if self._progress is not None:
            with self._lock:
                self._progress(num_rows)

    def begin(self, target: _Target, shard: Shard) -> _Output:
        """Open the outputs of a file."""
        first = self._first_shape(shard)
        dim = shard.dim or (first.dim if first else 0)
        dtype = self._dtype or shard.dtype or (first.dtype if first else "float32")
        if dtype == "bfloat16" and target.format != "safetensors":
            dtype = "float32"
            self.notes.add("bfloat16 became float32, which loses nothing: only safetensors holds bfloat16")
        if isinstance(shard, LoadedTar) and shard.stray is not None and target.format != "tar":
            self.notes.add(f"{shard.path}: members of no sample are left out, the first is {shard.stray!r}")
        if dim == 0 and target.format != format_of(shard.path):
            raise ValueError(f"{shard.path} has no rows and states no dimension: leave it out")
        output = _Output(target, shard, shard.num_rows or 0, dim, dtype, self.id_column)
        self._unfinished.append(output)
        output.encoders = open_encoders(
            shard,
            target.format,
            output.new_sink(target.path),
            lambda: output.new_sink(target.sidecar),
            column=self.column,
            id_column=self.id_column,
            num_rows=output.num_rows,
            dim=dim,
            dtype=dtype,
        )
        return output

    def _first_shape(self, shard: Shard) -> Shard | None:
        with self._lock:
            if shard.dim == 0:
                return self._first
            first = self._first = self._first or shard
        if (shard.dim, shard.dtype) != (first.dim, first.dtype):
            raise ValueError(
                f"{shard.path} has dimension {shard.dim} and dtype {shard.dtype}, "
                f"{first.path} has {first.dim} and {first.dtype}"
            )
        return first

    def finish(self, index: int, output: _Output, closed: Future[bool]) -> None:
        """Put a file in its place; called in the thread that syncs."""
        if closed.result():
            self._journal.add(output.finish())
            self._unfinished.remove(output)
        copy = self._copies.pop(index, None)
        if copy is not None:
            copy.unlink(missing_ok=True)


class _Lane:
    """Takes one file after the other: reads and transforms here, encodes in a second thread; a third syncs for all."""

    def __init__(self, run: _Run, num_threads: int, syncer: ThreadPoolExecutor) -> None:
        self._run = run
        self._num_threads = num_threads
        self._syncer = syncer
        num_bytes = BATCH_BYTES if num_threads > 1 else BATCH_BYTES // 2  # the lanes share the cache
        self._raw = Blocks(num_bytes, 1, num_threads)
        self._decoded = Blocks(num_bytes, _DEPTH, num_threads)
        self._out = Blocks(num_bytes, _DEPTH)
        self._writes: deque[Future[None]] = deque()
        self._syncs: deque[Future[None]] = deque()

    def work(self) -> None:
        index = 0
        try:
            with ThreadPoolExecutor(1, "realign-write") as writer:
                while (found := self._run.next_file()) is not None:
                    index = found[0]
                    self._rewrite(*found, writer)
                for pending in (*self._writes, *self._syncs):
                    pending.result()
        except BaseException as error:
            self._run.fail(index, error)

    def _rewrite(self, index: int, target: _Target, path: Path, writer: ThreadPoolExecutor) -> None:
        shard = open_shard(path, self._run.column)
        if isinstance(shard, PickleShard | TarShard):
            shard = shard.load()
        output = self._run.begin(target, shard)
        blocks = self._decoded if shard.decoded else self._raw
        chunks = read(shard, target.format, blocks)
        for chunk in prefetch(chunks, _DEPTH) if shard.decoded else chunks:
            if self._run.given_up(index):
                return
            self._map(output, chunk, writer)
        if output.rows_done != output.num_rows:
            raise ValueError(f"{target.source}: expected {output.num_rows} rows, found {output.rows_done}")
        if fingerprint(target.source) != self._run.fingerprints[target.source.name]:
            raise ValueError(f"{target.source} has changed since the job began: start it again with overwrite")
        self._syncs.append(self._syncer.submit(self._run.finish, index, output, writer.submit(output.close)))
        if len(self._syncs) > _MAX_UNSYNCED_FILES:
            self._syncs.popleft().result()

    def _map(self, output: _Output, chunk: Chunk, writer: ThreadPoolExecutor) -> None:
        if len(self._writes) == _DEPTH:  # the block about to be taken is that of the oldest write
            self._writes.popleft().result()
        num_rows, dim = chunk.rows.values.shape
        out = Rows(self._out.take(num_rows, dim, storage(output.dtype)), output.dtype)
        path = output.target.source
        number = (output.target.number << 40) + chunk.start
        try:
            num_zero, num_nonfinite, _ = self._run.transform(chunk.rows, out, self._num_threads, number)
        except BadRowsError as error:
            chunk.check()
            raise error.moved(str(path), chunk.start) from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        output.bad_rows += num_zero + num_nonfinite
        output.rows_done += num_rows
        self._writes.append(writer.submit(output.write, out, chunk))
        self._run.advance(num_rows)


def verify(out_dir: str | os.PathLike[str], progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Compare a folder that `rewrite` has written with its manifest.

    Checks that the job has finished, that each file is there with the size and hash stated, that it can be read and has
    the rows, dimension and dtype stated, that rows have length one where the job makes them so (zeros only as many as
    there were bad rows), that ids, in the file or beside it, are those of the input in their order, and that there are
    no other files.

    Returns
    -------
    dict
        `ok`, `problems` (a list of lines), `files`, `rows` and `bytes` as the manifest states them.

    Raises
    ------
    FileNotFoundError
        If there is no manifest.
    ValueError
        If the manifest is damaged or names files outside the folder.
    """
    folder = Path(out_dir)
    manifest = _manifest.load(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}")
    problems = []
    num_inputs = len(manifest.head["inputs"])
    if not manifest.finished or len(manifest.files) != num_inputs:
        problems.append(f"the job has finished {len(manifest.files)} of {num_inputs} files: run it again with resume")
    unit_norm = manifest.head["job"].get("unit_norm") is True
    for entry in manifest.files.values():
        damaged = [_hash_problem(folder, output) for output in _manifest.outputs_of(entry)]
        found = [problem for problem in damaged if problem] or _content_problems(folder, entry, unit_norm)
        problems += found or _id_problems(folder, entry)
        if progress is not None:
            progress(entry["rows"])
    known = manifest.names() | {MANIFEST, _manifest.JOURNAL, *(path.name for path in _manifest.journal_parts(folder))}
    problems += [f"{path.name} is in no manifest" for path in sorted(folder.iterdir()) if path.name not in known]
    entries = manifest.files.values()
    return {
        "ok": not problems,
        "problems": problems,
        "files": len(entries),
        "rows": sum(entry["rows"] for entry in entries),
        "bytes": sum(output["size"] for entry in entries for output in _manifest.outputs_of(entry)),
    }


def _hash_problem(folder: Path, output: dict[str, Any]) -> str | None:
    path = folder / output["name"]
    try:
        fd = os.open(path, os.O_RDONLY | O_PLAIN)
    except OSError as error:
        return f"{output['name']}: {error.strerror}"
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return f"{output['name']} is no plain file"
    with open(fd, "rb", buffering=0) as file:
        size = os.fstat(fd).st_size
        if size != output["size"]:
            return f"{output['name']} has {size} bytes, the manifest states {output['size']}"
        hasher = _C.XXH64()
        block = memoryview(bytearray(BATCH_BYTES))
        while count := file.readinto(block):
            hasher.update(block[:count])
    if hasher.hexdigest() != output["xxh64"]:
        return f"{output['name']} has changed: its hash is {hasher.hexdigest()}, the manifest states {output['xxh64']}"
    return None


def _id_problems(folder: Path, entry: Entry) -> list[str]:
    if entry.get("ids") is None:
        return []
    holder = entry["sidecar"] or entry
    try:
        problem = id_problem(folder / holder["name"], entry["ids"]["column"], entry["ids"]["xxh64"], entry["rows"])
    except (OSError, ValueError) as error:
        return [str(error)]
    return [] if problem is None else [problem]


def _content_problems(folder: Path, entry: Entry, unit_norm: bool) -> list[str]:
    name, num_rows, num_zero = entry["name"], 0, 0
    try:
        shard = open_shard(folder / name, entry["column"])
        for chunk in prefetch(shard.chunks(Blocks(BATCH_BYTES, _DEPTH)), _DEPTH):
            rows, dim = chunk.rows, chunk.rows.values.shape[1]
            if (dim, rows.dtype) != (entry["dim"], entry["dtype"]):
                return [f"{name} has {dim} x {rows.dtype}, the manifest states {entry['dim']} x {entry['dtype']}"]
            num_rows += len(rows.values)
            if not unit_norm:
                continue
            values = to_float64(rows)
            norms = np.sqrt(np.einsum("ij,ij->i", values, values))
            num_zero += int((norms == 0).sum())
            wrong = np.flatnonzero(~(np.abs(norms - 1) <= _NORM_TOLERANCE[rows.dtype]) & (norms != 0))
            if wrong.size:
                return [f"{name}: row {chunk.start + wrong[0]} has length {norms[wrong[0]]:.6g}, expected 1"]
    except (OSError, ValueError) as error:
        return [str(error)]
    if num_rows != entry["rows"]:
        return [f"{name} has {num_rows} rows, the manifest states {entry['rows']}"]
    if num_zero > entry["bad_rows"]:
        return [f"{name} has {num_zero} rows of zeros, the manifest states {entry['bad_rows']} bad rows"]
    return []
