"""Embeddings on disk for torch's data loaders, aligned on their way."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import torch
    from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info
except ModuleNotFoundError as missing:
    raise ImportError("realign_fast.data needs torch: pip install 'realign-fast[torch]'") from missing

from ._columns import map_column
from ._drift import watch_for
from ._dtypes import Rows, storage
from ._errors import raise_if_bad
from ._native import _C
from ._rows import host_tensor, host_values, is_tensor
from ._steps import Noise
from ._transform import Steps, transform_rows
from .alignment import Alignment, DriftWarning
from .backends import count_threads
from .io._ids import Ids, open_ids
from .io._prefetch import prefetch
from .io._random import BadRows, RandomRows
from .io.sources import file_paths

__all__ = ["DriftWarning", "EmbeddingDataset", "EmbeddingStream", "align", "align_collate"]

# What a thread maps at a time: small enough for the last cache between being read and being mapped, large enough that
# the calls do not count.
_PART_BYTES = 2 << 20
# What is read from one place of a file at least, where rows are shuffled.
_UNIT_BYTES = 1 << 20
_SAMPLES_AT_ONCE = 256
# Of which memory is kept for the next batch, and for how many: those of a loop and what it works ahead.
_LARGE_BYTES, _MAX_BUFFERS = 1 << 20, 8
_LINE_BYTES = 64
_STATE_VERSION = 1

Sample = dict[str, Any]
# Writes the rows from some place of a batch on into an array, with so many threads; mapped, where it is given a map.
Fill = Callable[[int, NDArray[Any], int, _C.RowMap | None], BadRows]


class _AlignedRows:
    """Rows of files by number, mapped by an alignment, if there is one, on their way into a tensor."""

    def __init__(
        self,
        paths: Any,
        alignment: Alignment | None,
        column: str | None,
        id_column: str,
        ids: Any,
        index: str | os.PathLike[str] | None,
        check_drift: bool | int,
    ) -> None:
        self.rows = RandomRows(file_paths(paths), column)
        if alignment is not None and alignment.dim != self.rows.dim:
            raise ValueError(f"alignment has dimension {alignment.dim}, the rows have {self.rows.dim}")
        if ids is not None and index is None:
            raise ValueError("ids need an index: pass index=, the file that is to hold it")
        self._alignment = alignment
        self._watch = watch_for(alignment, check_drift)
        self._memory = _Memory()
        self.ids: Ids | None = None
        if index is not None:
            self.ids = open_ids(Path(index), self.rows, id_column, None if ids is None else file_paths(ids))

    def take(self, numbers: NDArray[np.int64], fill: Fill | None, seed: int) -> torch.Tensor:
        """Return the rows with these numbers `(n,)` as a tensor `(n, dim)`; in a loader's worker, in shared memory.

        `fill` says how, by default by reading one after the other. The seed is that of noise.
        """
        out, target = self._memory.new((len(numbers), self.rows.dim), self.rows.dtype)
        threads = 1 if len(numbers) == 1 else count_threads(None)
        fill = fill or (lambda start, to, *how: self.rows.read(numbers[start : start + len(to)], to, *how))
        if self._alignment is None:
            fill(0, target, threads, None)
            return out
        parameters = self._alignment.parameters
        steps = Steps.of(parameters)
        row_map = None  # of rows that may be mapped as they are read
        if steps.single and steps.table and not parameters.noise_std and self._watch is None:
            row_map = steps.table[0].row_map
        step = max(1, _PART_BYTES * threads // self.rows.row_bytes if row_map is None else len(numbers))
        for start in range(0, len(numbers), step):
            to = target[start : start + step]
            bad = fill(start, to, threads, row_map)
            if row_map is None:
                rows = Rows(to, self.rows.dtype)
                if self._watch is not None:
                    self._watch.look(rows, threads)
                noise = Noise.of(parameters.noise_std, seed, numbers[start : start + len(to)], (len(to),))
                bad = transform_rows(Steps.of(parameters, noise), rows, rows, threads)
            if bad[2] >= 0:
                raise_if_bad(bad, "raise", f"the batch with {self.rows.place(int(numbers[start + bad[2]]))}")
        return out

    def ids_of(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """Return the ids `(n,)` of the rows with these numbers, int64 or text."""
        return numbers if self.ids is None else self.ids.of(numbers)


class _Memory:
    """Tensors for batches, of memory that earlier ones have left: fresh pages cost more than reading into them."""

    def __init__(self) -> None:
        self._buffers: list[tuple[NDArray[np.uint8], int]] = []  # and where in them a line begins
        self._lock = Lock()

    def __getstate__(self) -> None:
        return None

    def __setstate__(self, _: None) -> None:
        self.__init__()  # type: ignore[misc]

    def new(self, shape: tuple[int, int], dtype: str) -> tuple[torch.Tensor, NDArray[Any]]:
        """Return an uninitialised tensor, in a loader's worker in shared memory, and the array that is its memory."""
        stored = storage(dtype)
        size = shape[0] * shape[1] * stored.itemsize
        if get_worker_info() is not None:
            # As torch's own collate function does: what is sent to the main process then need not be copied.
            shared = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
            out = torch.empty(0, dtype=getattr(torch, dtype)).set_(shared, 0, shape, (shape[1], 1))
            return out, host_values(out, dtype)
        if size < _LARGE_BYTES:
            array = np.empty(shape, stored)  # and not torch's, which takes three times as long for one row
        else:
            with self._lock:
                array = self._free(size).view(stored).reshape(shape)
        return host_tensor(array, dtype), array

    def _free(self, size: int) -> NDArray[np.uint8]:
        for buffer, begin in self._buffers:
            # Of its pair, this name and the call: no tensor has it any more.
            if buffer.nbytes >= size + _LINE_BYTES and sys.getrefcount(buffer) == 3:
                return buffer[begin : begin + size]
        buffer, begin = _lines(size)
        self._buffers = [*self._buffers[-_MAX_BUFFERS + 1 :], (buffer, begin)]
        return buffer[begin : begin + size]


def _lines(size: int) -> tuple[NDArray[np.uint8], int]:
    """Return uninitialised memory for so many bytes, and where in it a line begins: read into elsewhere is slower."""
    buffer = np.empty(size + _LINE_BYTES, np.uint8)
    return buffer, -buffer.ctypes.data % _LINE_BYTES


class EmbeddingDataset(Dataset[Sample]):
    """Rows of files by number and by id, each `{"embedding": (dim,) tensor, "id": ...}`.

    Nothing of the files is kept in memory, and workers copy nothing: rows are read where they lie. Batches come as a
    whole through `__getitems__`, which torch's loaders call.

    Parameters
    ----------
    paths
        A path, glob, directory or URL, or a list of such: npy, safetensors and uncompressed arrow files, and WebDataset
        tars, whose headers are read at the start. In a store, npy and safetensors files.
    alignment
        Maps the rows on their way; they keep their dtype. Noise, which only "c3" has, depends on `seed` and the row.
    column
        As `fit` takes it.
    ids, id_column
        Which column of ids to index: of the arrow files themselves, of the sidecar files that `apply` and `convert`
        write beside others, of the metadata that clip-retrieval writes beside its folders of embeddings, or of `ids`,
        parquet or arrow files that hold one id a row in the order of the rows. The ids of tars are their keys.
    index
        The file that holds the index: made where it is absent or the files have changed, mapped by every process.
        Without it, the id of a row is its number.
    seed
        Of noise.
    check_drift
        Whether to look at some rows before they are mapped, and to give one `DriftWarning` in each worker where their
        mean lies more than three noise floors from that of the fit, as `Alignment.check` measures it. True looks at
        windows of 8,192 rows, a number at so many: the first that come, then one row in 128, in 256 and so on, so that
        it costs less than a hundredth of the mapping. Rows in order of their sources are no random sample: shuffle
        them, or choose windows that span several.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If a file is damaged, of another dimension or dtype, or must be decoded; if ids are missing or occur twice.
    """

    def __init__(
        self,
        paths: Any,
        alignment: Alignment | None = None,
        *,
        column: str | None = None,
        ids: Any = None,
        id_column: str = "id",
        index: str | os.PathLike[str] | None = None,
        seed: int = 0,
        check_drift: bool | int = False,
    ) -> None:
        self._source = _AlignedRows(paths, alignment, column, id_column, ids, index, check_drift)
        self.seed = seed

    @property
    def dim(self) -> int:
        """Dimension of the rows."""
        return self._source.rows.dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        found: torch.dtype = getattr(torch, self._source.rows.dtype)
        return found

    def __len__(self) -> int:
        return self._source.rows.num_rows

    def numbers_of(self, ids: list[Any]) -> NDArray[np.int64]:
        """Return the numbers `(n,)` of the rows with these ids; KeyError for one that no row has."""
        return self._index.find(ids)

    def locate(self, ids: list[Any]) -> NDArray[np.int64]:
        """Return the numbers `(n,)` of the rows with these ids, -1 for those that no row has."""
        return self._index.locate(ids)

    @property
    def _index(self) -> Ids:
        if self._source.ids is None:
            raise ValueError("rows can be had by id with an index alone: pass index=, the file that is to hold it")
        return self._source.ids

    def __getitem__(self, item: int | str) -> Sample:
        """Return a row by number, from the end where it is negative, or by id where that is text."""
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int | str]) -> list[Sample]:
        """Return rows by number or by id, read and mapped together."""
        if len(items) == 0:
            return []
        if isinstance(items[0], str):
            numbers = self.numbers_of(list(items))
        else:
            numbers = np.asarray(items, np.int64)
            numbers = np.where(numbers < 0, numbers + len(self), numbers)
        embeddings = self._source.take(numbers, None, self.seed).unbind(0)  # which finds out whether there are such
        ids = items if isinstance(items[0], str) else self._source.ids_of(numbers).tolist()
        return [{"embedding": embedding, "id": each} for embedding, each in zip(embeddings, ids, strict=True)]


class EmbeddingStream(IterableDataset[Sample]):
    """Rows of files as a stream, dealt to the ranks of a job and the workers of a loader without loss or repeats.

    Yields `{"embedding": (dim,) tensor, "id": ...}`, or with a `batch_size` whole batches, `(n, dim)` and `(n,)` ids, a
    tensor of int64 or an array of text, of which only the last of an epoch may be smaller; hand it to a `DataLoader`
    with `batch_size=None` then.
    Ranks get equally many rows but for one. In order, batches of a rank come in the order of the files however many
    workers there are. Shuffled, parts of the files come in random order and their rows through a buffer.

    Parameters
    ----------
    paths, alignment, column, ids, id_column, index, check_drift
        As `EmbeddingDataset`.
    batch_size
        Rows of a batch; None: rows one by one.
    shuffle
        Whether rows come in another order each epoch.
    seed
        Of that order and of noise, together with the epoch.
    buffer_rows
        Rows of the shuffle buffer of each worker.
    rank, world_size
        Of this process among those that share the rows; by default those of torch.distributed or torchrun, if any.

    Raises
    ------
    OSError, ValueError
        As `EmbeddingDataset`.
    """

    def __init__(
        self,
        paths: Any,
        alignment: Alignment | None = None,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        *,
        column: str | None = None,
        ids: Any = None,
        id_column: str = "id",
        index: str | os.PathLike[str] | None = None,
        buffer_rows: int = 32768,
        rank: int | None = None,
        world_size: int | None = None,
        check_drift: bool | int = False,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if buffer_rows < 1:
            raise ValueError(f"buffer_rows must be at least 1, got {buffer_rows}")
        self.rank, self.world_size = _place_in_job(rank, world_size)
        self._source = _AlignedRows(paths, alignment, column, id_column, ids, index, check_drift)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        at_once = batch_size or _SAMPLES_AT_ONCE
        self._at_once = at_once
        self._block_rows = max(1, buffer_rows // at_once) * at_once if shuffle else at_once
        # Shared with the workers, which persistent loaders never ask anew.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._begin: dict[str, Any] | None = None
        self._now: tuple[int, int, int, int] | None = None  # what `_state` takes

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the noise of the next iteration, as a `DistributedSampler` does; the first is 0."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Return how many batches, or rows, this rank gets in an epoch."""
        first, end = self._share()
        return -(-(end - first) // self.batch_size) if self.batch_size else end - first

    def _share(self) -> tuple[int, int]:
        count = self._source.rows.num_rows
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size

    def state_dict(self) -> dict[str, Any]:
        """Return where the iteration of this process stands, for `load_state_dict` to go on with the next sample.

        In a loader with workers each of them has its own: torchdata's `StatefulDataLoader` gathers these.
        """
        if self._now is None and self._begin is not None:
            return dict(self._begin)
        return self._state(*(self._now or (0, 1, int(self._epoch), 0)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin where that of `state_dict` stood; its epoch is set too.

        Raises
        ------
        ValueError
            If the state is that of other files, settings, ranks or workers.
        """
        expected = self._state(0, 1, 0, 0)
        for name in ("version", "rows", "batch_size", "shuffle", "seed", "block_rows", "rank", "world_size"):
            if name not in state or state[name] != expected[name]:
                raise ValueError(f"state: {name} is {state.get(name)!r}, this stream has {expected[name]!r}")
        self._begin, self._now = dict(state), None
        self.set_epoch(int(state["epoch"]))

    def _state(self, worker: int, num_workers: int, epoch: int, done: int) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION,
            "rows": self._source.rows.num_rows,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "block_rows": self._block_rows,
            "rank": self.rank,
            "world_size": self.world_size,
            "worker": worker,
            "num_workers": num_workers,
            "epoch": epoch,
            "done": done,
        }

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        begin, self._begin = self._begin, None
        epoch, done = int(self._epoch), 0
        if begin is not None:
            if (begin["worker"], begin["num_workers"]) != (worker, num_workers):
                raise ValueError(
                    f"state is that of worker {begin['worker']} of {begin['num_workers']}, this is worker {worker} of "
                    f"{num_workers}"
                )
            epoch, done = int(begin["epoch"]), int(begin["done"])
        # Already now: a loader may ask a worker where it stands before its first batch.
        self._now = worker, num_workers, epoch, done
        return self._samples(worker, num_workers, epoch, done, in_worker=info is not None)

    def _samples(
        self, worker: int, num_workers: int, epoch: int, done: int, *, in_worker: bool
    ) -> Generator[Sample, None, None]:
        batches = self._batches(worker, num_workers, epoch, done)
        if not in_worker:  # there, the loader itself works ahead
            batches = prefetch(batches, 2)
        for embeddings, ids in batches:
            if self.batch_size:
                done += len(ids)
                self._now = worker, num_workers, epoch, done
                yield {"embedding": embeddings, "id": torch.from_numpy(ids) if ids.dtype == np.int64 else ids}
                continue
            for embedding, each in zip(embeddings.unbind(0), ids.tolist(), strict=True):
                done += 1
                self._now = worker, num_workers, epoch, done
                yield {"embedding": embedding, "id": each}
        if not in_worker:  # one that is done waits for the others, with nothing left to give
            self._now = None

    def _batches(
        self, worker: int, num_workers: int, epoch: int, done: int
    ) -> Generator[tuple[torch.Tensor, NDArray[Any]], None, None]:
        """Yield what this worker gets after its first `done` rows."""
        order_seed, noise_seed = np.random.SeedSequence([self.seed, epoch]).generate_state(2, np.uint64).tolist()
        buffer = np.empty((0, self._source.rows.dim), storage(self._source.rows.dtype))
        blocks = self._blocks(worker, num_workers, order_seed, done)
        block = next(blocks, None)
        while block is not None:
            ranges, numbers, chosen = block
            if chosen is not None:
                buffer = self._read_block(ranges, buffer)
            for start in range(0, len(numbers), self._at_once):
                some = slice(start, start + self._at_once)
                fill = self._from_files(numbers[some]) if chosen is None else self._from_buffer(buffer, chosen[some])
                embeddings = self._source.take(numbers[some], fill, noise_seed)
                if some.stop >= len(numbers):
                    # Before the batch is given away: whoever waits for it would run whenever NumPy lets other threads
                    # run, and the next read would begin only after that.
                    block = next(blocks, None)
                yield embeddings, self._source.ids_of(numbers[some])

    def _blocks(
        self, worker: int, num_workers: int, seed: int, done: int
    ) -> Generator[tuple[list[tuple[int, int]], NDArray[np.int64], NDArray[np.intp] | None], None, None]:
        """Yield of the rank's blocks every `num_workers`-th, after the first `done` rows of these.

        Where it lies in the files, the numbers of its rows in the order of the batches, and for shuffled ones their
        places in the block.
        """
        first, end = self._share()
        order = _Order(self._source.rows, seed if self.shuffle else None)
        for number, begin in enumerate(range(first + worker * self._block_rows, end, num_workers * self._block_rows)):
            count = min(self._block_rows, end - begin)
            if done >= count:
                done -= count
                continue
            ranges = order.ranges(begin, count)
            numbers = np.concatenate([np.arange(start, start + length) for start, length in ranges])
            chosen = None
            if self.shuffle:
                block = number * num_workers + worker
                chosen = np.random.default_rng([seed, self.rank, block]).permutation(count)[done:]
            yield ranges, numbers[done:] if chosen is None else numbers[chosen], chosen
            done = 0

    def _read_block(self, ranges: list[tuple[int, int]], buffer: NDArray[Any]) -> NDArray[Any]:
        """Return the rows of a block as they lie, in the memory of the last one if there is room."""
        ends = np.cumsum([length for _, length in ranges])
        if len(buffer) < ends[-1]:
            size = int(ends[-1]) * self._source.rows.row_bytes
            memory, begin = _lines(size)
            buffer = memory[begin : begin + size].view(buffer.dtype).reshape(-1, buffer.shape[1])
        parts = np.split(buffer[: ends[-1]], ends[:-1])
        starts = [start for start, _ in ranges]
        self._source.rows.read_ranges(list(zip(starts, parts, strict=True)), count_threads(None))
        return buffer

    def _from_files(self, numbers: NDArray[np.int64]) -> Fill:
        return lambda start, to, *how: self._source.rows.read_range(int(numbers[start]), to, *how)

    def _from_buffer(self, buffer: NDArray[Any], chosen: NDArray[np.intp]) -> Fill:
        return lambda start, to, *how: self._source.rows.take(buffer, chosen[start : start + len(to)], to, *how)


class _Order:
    """The rows of an epoch in the order in which they are dealt out: as they lie, or in parts in random order.

    The parts begin at a random row, and go around at the end of the last file: so none is always the last.
    """

    def __init__(self, rows: RandomRows, seed: int | None) -> None:
        self._count = rows.num_rows
        self._unit = max(1, _UNIT_BYTES // rows.row_bytes) if seed is not None else self._count
        self._parts, self._turn = np.zeros(1, np.int64), 0
        if seed is not None:
            rng = np.random.default_rng(seed)
            # The last part, which may be shorter, stays the last, so that places are easily found.
            self._parts = np.append(rng.permutation(self._count // self._unit), self._count // self._unit)
            self._turn = int(rng.integers(self._count))

    def ranges(self, begin: int, count: int) -> list[tuple[int, int]]:
        """Return the first row and the length of each range that makes up places `begin` to `begin + count`."""
        found = []
        while count:
            part, offset = divmod(begin, self._unit)
            length = min(count, self._unit - offset)
            row = (int(self._parts[part]) * self._unit + offset + self._turn) % self._count
            length = min(length, self._count - row)
            found.append((row, length))
            begin, count = begin + length, count - length
        return found


def _place_in_job(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError("rank and world_size belong together: pass both or neither")
    if rank is None or world_size is None:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1, got {rank} of {world_size}")
    return rank, world_size


class _Align:
    """See `align`; a class, since it must be pickled for workers."""

    def __init__(
        self,
        alignment: Alignment,
        key: str,
        collate: Callable[[list[Any]], Any] | None,
        seed: int,
        check_drift: bool | int,
    ) -> None:
        self._alignment, self._key, self._collate, self._seed = alignment, key, collate, seed
        self._watch = watch_for(alignment, check_drift)

    def __call__(self, sample: Any) -> Any:
        """Map the embeddings of a sample or a batch."""
        if self._collate is not None:
            sample = self._collate(sample)
        return map_column(sample, self._key, self._map)

    def _map(self, x: Any) -> Any:
        if self._watch is not None:
            self._watch.look((x.detach() if is_tensor(x) else x).reshape(-1, x.shape[-1]))
        # Rows have no numbers here, so noise is that of their content: no two batches get the same.
        index = _numbers_of(x) if self._alignment.parameters.noise_std else None
        return self._alignment.transform(x, seed=self._seed, index=index)


def _numbers_of(x: Any) -> NDArray[np.int64]:
    rows = x.detach().float().cpu().numpy() if is_tensor(x) else np.asarray(x, np.float32)
    flat = np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]))
    offsets = np.arange(len(flat) + 1, dtype=np.int64) * flat.shape[1] * flat.itemsize
    hashes = np.empty(len(flat), np.uint64)
    _C.hash_ids(offsets, flat, hashes)
    return hashes.view(np.int64).reshape(rows.shape[:-1])


def align(
    alignment: Alignment, key: str = "embedding", *, seed: int = 0, check_drift: bool | int = False
) -> Callable[[Any], Any]:
    """Return a function that maps the embeddings of a sample, or of a batch of them, and leaves the rest as it is.

    It takes and returns a dict, as `datasets.map` (`batched` or not), WebDataset's and torchdata's `map` and Ray Data's
    `map` and `map_batches` want it, or a pyarrow table or a pandas frame, which the last can hand it too
    (`batch_format`), and can be pickled. Embeddings are arrays or tensors `(..., dim)`, or lists of numbers; lists of
    Python become float32 arrays, columns of arrow keep their type.

    Parameters
    ----------
    alignment
        A fitted one.
    key
        Where the embeddings lie.
    seed
        Of noise, which only "c3" has: that of a row depends on the seed and on its values.
    check_drift
        As `EmbeddingDataset`: here each copy of the function warns for itself.
    """
    return _Align(alignment, key, None, seed, check_drift)


def align_collate(
    alignment: Alignment,
    key: str = "embedding",
    collate: Callable[[list[Any]], Any] | None = None,
    *,
    seed: int = 0,
    check_drift: bool | int = False,
) -> Callable[[list[Any]], Any]:
    """Return a collate function: `collate`, by default torch's own, and then `align`.

    Parameters
    ----------
    alignment, key, seed, check_drift
        As `align`.
    collate
        Makes a dict of a list of samples.
    """
    return _Align(alignment, key, collate or default_collate, seed, check_drift)
