"""Files and host memory through a GPU: while it computes one batch, the next is copied and a third is read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import _triton_rows
from ._dtypes import Rows
from ._errors import BadRowsError
from ._native import _C
from ._reader import Reader
from ._rows import dtype_name, host_values
from ._sample import Sample, take_rows
from ._steps import Noise
from ._torch_steps import staged_transform
from ._triton_rows import Accumulator, affine, read_bad_rows
from .backends import count_threads
from .io.sources import MemorySource, Source
from .kernels._rows import on_device
from .methods import Parameters
from .moments import Moments, Precision

_DEPTH = 3  # batches in flight
_PIECE_BYTES = 4 << 20  # of host memory at a time: copies of less would wait for each other
_PART_BYTES = 512 << 20  # of tensors on the device at a time: bounds the keys of their rows


class Slot:
    """Rows on the device, and a page-locked copy of them on the host where they came from there.

    Attributes
    ----------
    rows : torch.Tensor
        `(n, dim)` on the device.
    origin, start
        As in `io.sources.Batch`.
    """

    rows: torch.Tensor
    origin: str
    start: int

    def __init__(self, device: torch.device) -> None:
        self._module = _module(device)
        self._device = device
        self._buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._done = self._module.Event()

    def buffers(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memory of the host, page-locked, and of the device; the same at each call with the same name."""
        size = int(np.prod(shape)) * dtype.itemsize
        host, there = self._buffers.get(name, (torch.empty(0), torch.empty(0)))
        if host.nbytes < size:
            host = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            there = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._buffers[name] = host, there
        return tuple(each[:size].view(dtype).view(shape) for each in (host, there))  # type: ignore[return-value]

    def launched(self) -> None:
        """Say that all work on what it holds has been given to the device."""
        self._done.record()

    def wait(self) -> None:
        """Wait until that work is done."""
        self._done.synchronize()

    def take(self, numbers: NDArray[np.intp], out: NDArray[Any]) -> None:
        """Copy rows of these numbers to `out`, `(m, dim)` in `storage(dtype)`."""
        if "rows" in self._buffers:
            host, _ = self.buffers("rows", tuple(self.rows.shape), self.rows.dtype)
            take_rows(host_values(host, dtype_name(self.rows.dtype)), numbers, out)
        else:
            chosen = self.rows[torch.from_numpy(numbers).to(self._device)]
            out[:] = host_values(chosen.cpu(), dtype_name(self.rows.dtype))


class Feed:
    """Brings batches to a device through slots that are used in turn."""

    def __init__(self, device: torch.device, num_threads: int | None) -> None:
        self._module = _module(device)
        self._slots = [Slot(device) for _ in range(_DEPTH)]
        self._copies = self._module.Stream()
        self._num_threads = num_threads

    def slots(self, batches: Iterable[tuple[Rows, str, int]]) -> Generator[Slot, None, None]:
        """Yield a slot for each batch; the work on one must have been launched when the next is asked for."""
        for number, (rows, origin, start) in enumerate(batches):
            slot = self._slots[number % _DEPTH]
            slot.wait()
            slot.origin, slot.start = origin, start
            # Its memory is that stream's too: what other streams have freed they may still be using.
            with self._module.stream(self._copies):
                host, slot.rows = slot.buffers("rows", rows.values.shape, getattr(torch, rows.dtype))
                copy_rows(rows.values, host_values(host, rows.dtype), count_threads(self._num_threads))
                slot.rows.copy_(host, non_blocking=True)
            self._module.current_stream().wait_stream(self._copies)
            yield slot
            slot.launched()


def copy_rows(values: NDArray[Any], out: NDArray[Any], num_threads: int) -> None:
    """Copy with all threads where the memory is of one piece."""
    if values.flags.c_contiguous:
        _C.stream_copy(values, out, False, num_threads)
    else:
        np.copyto(out, values)


class DeviceReader(Reader):
    """Reads through the Triton kernels; bad rows are counted there, and raised once all rows have been read."""

    def __init__(self, device: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._device = torch.device(device)

    def moments(self, source: Source, covariance: bool = False, precision: Precision = "high") -> Moments:
        """Return the moments of all rows, with their covariance where asked for."""
        moments = Moments(source.dim, covariance, precision)
        return self._read_there(source, moments, lambda accumulator, slot: accumulator.add(slot.rows))

    def moments_and_sample(self, source: Source, covariance: bool = False) -> tuple[Moments, Sample]:
        """Return the moments of all rows, and some of them, chosen by their content."""
        sample = self._new_sample(source)
        waiting: list[tuple[Slot, torch.Tensor]] = []

        def look() -> None:
            slot, keys = waiting.pop()
            slot.wait()
            sample.add(keys.numpy().view(np.uint64), slot.take)

        def add(accumulator: Accumulator, slot: Slot) -> None:
            host, keys = slot.buffers("keys", (len(slot.rows),), torch.int64)
            accumulator.add(slot.rows, keys)
            host.copy_(keys, non_blocking=True)
            if waiting:  # by now the device has the next batch to work on
                look()
            waiting.append((slot, host))

        moments = self._read_there(source, Moments(source.dim, covariance), add)
        if waiting:
            look()
        return moments, sample

    def mapped(self, source: Source, parameters: Parameters) -> Moments:
        """Return the moments of what the map makes of all rows: of a GPU they are finished."""
        maps, step = parameters.alone.on(self._device), parameters.affine

        def add(accumulator: Accumulator, slot: Slot) -> None:
            rows = slot.rows
            if step is not None:  # bad rows become zeros, and are counted as such
                rows = torch.empty(rows.shape, dtype=torch.float32, device=self._device)
                affine(slot.rows, rows, step)
            accumulator.add_transformed(rows, maps)

        return self._read_there(source, Moments(source.dim), add)

    def _read_there(self, source: Source, moments: Moments, add: Callable[[Accumulator, Slot], None]) -> Moments:
        with on_device(self._device):
            accumulator = None
            firsts, places = [], []
            with (
                self._showing(source) as advance,
                closing(self._slots(source)) as slots,
            ):
                for slot in slots:
                    if accumulator is None:
                        accumulator = moments.new_accumulator(slot.rows)
                    firsts.append(accumulator.num_rows)
                    places.append((slot.origin, slot.start))
                    add(accumulator, slot)
                    advance(len(slot.rows))
            if accumulator is None:
                return moments
            try:
                moments.add_accumulator(accumulator, self._on_bad_rows)
            except BadRowsError as error:
                batch = bisect_right(firsts, error.row) - 1
                origin, start = places[batch]
                raise error.moved(origin, start - firsts[batch]) from None
            return moments

    def _slots(self, source: Source) -> Generator[Slot, None, None]:
        if isinstance(source, MemorySource) and source.device is not None:
            return self._slots_there(source)
        return Feed(self._device, self._num_threads).slots(batch[:3] for batch in source.batches(self._limit))

    def _slots_there(self, source: MemorySource) -> Generator[Slot, None, None]:
        start = 0
        for part, _ in source.parts(_PART_BYTES):
            slot = Slot(self._device)
            rows = part.detach().reshape(-1, source.dim)
            slot.rows = rows if self._limit is None else rows[: max(0, self._limit - start)]
            slot.origin, slot.start = source.name, start
            if not len(slot.rows):
                return
            yield slot
            slot.launched()
            start += len(slot.rows)


class DeviceTransform:
    """Maps rows of host memory through a device; each thread that calls it needs one of its own."""

    def __init__(self, parameters: Parameters, device: Any, num_threads: int | None) -> None:
        self._device = torch.device(device)
        self._parameters = parameters
        with on_device(self._device):
            self._feed = Feed(self._device, num_threads)

    def __call__(self, rows: Rows, out: Rows, num_threads: int, noise: Noise | None) -> tuple[int, int, int]:
        """Map `rows` into `out`; return `(num_zero, num_nonfinite, first_bad)`, bad rows being zeros."""
        step, table = self._parameters.affine, self._parameters.alone
        found: list[tuple[int, tuple[int, int, int]]] = []
        waiting: list[tuple[Slot, torch.Tensor, torch.Tensor]] = []

        def finish() -> None:
            slot, mapped, counts = waiting.pop(0)
            slot.wait()
            copy_rows(host_values(mapped, out.dtype), out.values[slot.start : slot.start + len(mapped)], num_threads)
            found.append((slot.start, read_bad_rows(counts)))

        with on_device(self._device):
            for slot in self._feed.slots(_pieces(rows)):
                host, mapped = slot.buffers("mapped", tuple(slot.rows.shape), getattr(torch, out.dtype))
                host_counts, _ = slot.buffers("counts", (3,), torch.int64)
                here = noise and noise.of_rows(slot.start, len(slot.rows))
                ((_, counts),) = staged_transform(_triton_rows, slot.rows, mapped, step, table, here)
                host_counts.copy_(counts, non_blocking=True)
                host.copy_(mapped, non_blocking=True)
                if waiting:
                    finish()
                waiting.append((slot, host, host_counts))
            while waiting:
                finish()
        firsts = [start + first for start, (_, _, first) in found if first >= 0]
        num_zero, num_nonfinite = (sum(bad[kind] for _, bad in found) for kind in (0, 1))
        return num_zero, num_nonfinite, min(firsts, default=-1)


def _pieces(rows: Rows) -> Iterator[tuple[Rows, str, int]]:
    step = max(1, _PIECE_BYTES // (rows.values.shape[1] * rows.values.itemsize))
    for start in range(0, len(rows.values), step):
        yield Rows(rows.values[start : start + step], rows.dtype), "", start


def _module(device: torch.device) -> Any:
    """Return torch's streams and events of that device; the CPU's do nothing, and Triton's interpreter needs none."""
    return torch.cuda if device.type == "cuda" else torch.cpu
