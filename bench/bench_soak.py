"""A fit of a billion rows: its speed against a sum over the same files, its memory, and whether it counts them all.

The plan names a few shards again and again, so that all of it lies in the page cache.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from _shards import DIM, ITEMSIZE, NUM_SHARDS, SHARD_ROWS, write_shards

from realign_fast import _C, Moments, fit
from realign_fast.alignment import gather_moments
from realign_fast.backends import count_threads

CHECKED_BY = ("test_moments.py", "test_alignment.py")
PEER = "a two-thread sum over the same mapped files"
WHY = {
    PEER: "the peer only adds; a fit hashes a row and multiplies it five times in two reads, and waits for the cache"
}


def repeated(paths: list[Path], num_rows: int, shard_rows: int) -> list[Path]:
    return [paths[number % len(paths)] for number in range(num_rows // shard_rows)]


def sum_over(paths: list[Path]) -> None:
    """Read the files as they lie, mapped, with two threads: no more than the adding up of their words."""
    for path in paths:
        _C.stream_read(np.load(path, mmap_mode="r").view(np.uint8).reshape(-1), 2)


class Memory:
    """The resident memory of this process, looked at all the while."""

    def __init__(self) -> None:
        self._samples: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._done.wait(0.02):
            self._samples.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def peak_mb(self) -> float:
        """In megabytes."""
        return max(self._samples, default=0) / 1e6


def test_a_billion_rows(measure, pick, folder):
    shard_rows, many = pick(10_000, SHARD_ROWS, SHARD_ROWS), pick(400_000, 40_000_000, 1_000_000_000)
    few = max(many // 10, NUM_SHARDS * shard_rows)
    paths, image = write_shards(folder, shard_rows)
    once = gather_moments(paths)
    few_paths, many_paths = repeated(paths, few, shard_rows), repeated(paths, many, shard_rows)
    # Such a fit reads the images once and the text twice.
    read_few, read_many = ((2 * count + shard_rows) * DIM * ITEMSIZE for count in (few, many))
    about = {"unit": "GB/s", "dtype": "float16", "why": WHY}
    with Memory() as memory_of_few:
        fit(few_paths, image)
    times: list[float] = []

    def fit_few() -> None:
        begin = time.perf_counter()
        fit(few_paths, image)
        times.append(time.perf_counter() - begin)

    peers = measure(
        "fit",
        fit_few,
        {PEER: lambda: sum_over([*few_paths, *few_paths, image])},
        work=read_few,
        limit="read",
        shape=(few, DIM),
        rounds=3,
        **about,
    )
    with Memory() as memory:
        begin = time.perf_counter()
        alignment = fit(many_paths, image)
        seconds = time.perf_counter() - begin
    if not peers:
        return
    sums = [peers[PEER] * read_many / read_few]
    measure.times("fit", [seconds], {PEER: sums}, work=read_many, shape=(many, DIM), goals={PEER: 0.7}, **about)
    whole, row, row_of_few = f"fit of {many:,} rows", seconds / many, float(np.median(times[1:])) / few
    apart = float(np.abs(alignment.source.mean - once.mean).max())
    held = {"goal": 1.0, "at_most": True}
    measure.figure(f"{whole}: a row", row * 1e9, "ns", f"of {few:,}", row / row_of_few, goal=1.05, at_most=True)
    measure.figure(f"{whole}: peak memory", memory.peak_mb, "MB", "600 MB", memory.peak_mb / 600, **held)
    measure.figure(
        f"{whole}: peak memory", memory.peak_mb, "MB", f"that of {few:,}", memory.peak_mb / memory_of_few.peak_mb
    )
    counted = alignment.source.count
    measure.figure(f"{whole}: rows counted", counted, "rows", "rows of the plan", counted / many, goal=1.0)
    measure.figure(f"{whole}: error of the mean", apart, "", "1e-12", apart / 1e-12, **held)


@pytest.mark.parametrize("which", ["first", "second"])
def test_reads_from_memory(measure, pick, which):
    """The two reads of a fit without files: the rest is the mapping of them."""
    count = pick(10_000, 2_000_000, 4_000_000)
    rows = np.resize(np.random.default_rng(0).standard_normal((1024, DIM), np.float32).astype(np.float16), (count, DIM))
    alignment, moments, sums = fit(rows[:5000], -rows[:5000]), Moments(DIM), np.zeros(DIM, np.int64)
    row_map = _C.RowMap(float(alignment.scale), alignment.shift, alignment.correction)
    reads = {
        "first": lambda: moments.update(rows),
        "second": lambda: _C.transformed_moments(rows, False, row_map, sums, count_threads(None)),
    }
    measure(
        f"{which} read of a fit, from memory",
        reads[which],
        {"a sum of the same memory": lambda: _C.stream_read(rows, count_threads(None))},
        unit="GB/s",
        work=rows.nbytes,
        limit="read",
        dtype="float16",
        shape=rows.shape,
        why={"a sum of the same memory": WHY[PEER]},
    )
