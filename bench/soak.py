"""A fit of a billion rows: its speed against a sum over the same files, its memory, and whether it counts them all.

The plan names a few shards again and again, so that all of it lies in the page cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _tables import arguments, report, row

from realign_fast import _C, fit
from realign_fast.alignment import gather_moments
from realign_fast.benchmark import interleave, machine, summarise

DIM, NUM_SHARDS, SHARD_ROWS = 256, 4, 1_000_000
ITEMSIZE = 2
# In a process of its own: a peak of memory is that of all that a process has ever done.
WRITE = """
import sys
import numpy as np
seed, count, dim = map(int, sys.argv[2:])
rng = np.random.default_rng(seed)
rows = rng.standard_normal((count, dim), np.float32)
rows += 0.3 * rng.standard_normal(dim, np.float32)
np.save(sys.argv[1], rows.astype(np.float16))
"""


def write_shards(folder: Path, shard_rows: int) -> tuple[list[Path], Path]:
    paths = [folder / f"text_{number}.npy" for number in range(NUM_SHARDS)]
    for seed, path in enumerate([*paths, folder / "image.npy"]):
        subprocess.run([sys.executable, "-c", WRITE, path, str(seed), str(shard_rows), str(DIM)], check=True)
    return paths, folder / "image.npy"


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
        return max(self._samples) / 1e6


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--folder", help="where the shards are written for the time of the run")
    parser.add_argument("--rows", type=int, default=1_000_000_000)
    options = parser.parse_args()
    shard_rows, many, rounds = (10_000, 400_000, 2) if options.quick else (SHARD_ROWS, options.rows, 3)
    few = max(many // 10, NUM_SHARDS * shard_rows)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths, image = write_shards(Path(folder), shard_rows)
        once = gather_moments(paths)
        few_paths, many_paths = repeated(paths, few, shard_rows), repeated(paths, many, shard_rows)
        # Such a fit reads the images once and the text twice.
        cases = {
            "fit": lambda: fit(few_paths, image),
            "sum": lambda: sum_over([*few_paths, *few_paths, image]),
        }
        with Memory() as memory_of_few:
            cases["fit"]()
        times = interleave(cases, rounds)
        with Memory() as memory:
            begin = time.perf_counter()
            alignment = fit(many_paths, image)
            seconds = time.perf_counter() - begin
        again = interleave(cases, 1)
    found = {name: summarise(times[name] + again[name]) for name in cases}
    read, read_of_many = ((2 * count + shard_rows) * DIM * ITEMSIZE / 1e9 for count in (few, many))
    per_row, per_row_of_few = seconds / many, summarise(times["fit"][-1:] + again["fit"])["median_s"] / few
    counted = float(alignment.source.count == many)
    apart = float(np.abs(alignment.source.mean - once.mean).max())
    spread, whole = found["fit"]["spread"], f"fit, {many:,} x {DIM} float16"
    rate, rate_of_many, sum_rate = (
        read / found["fit"]["median_s"],
        read_of_many / seconds,
        read / found["sum"]["median_s"],
    )
    peer = "a two-thread sum over the same mapped files"
    slower, grown = per_row / per_row_of_few, memory.peak_mb / memory_of_few.peak_mb
    lines = [
        row(f"fit, {few:,} x {DIM} float16", rate, peer, rate / sum_rate, "none", spread, "GB/s"),
        row(whole, rate_of_many, peer, rate_of_many / sum_rate, "0.7x", spread, "GB/s"),
        row(f"{whole}: a row", per_row * 1e9, f"a row of {few:,}", slower, "1.05x at most", spread, "ns"),
        row(f"{whole}: peak memory", memory.peak_mb, "600 MB", memory.peak_mb / 600, "1x at most", 0, "MB"),
        row(f"{whole}: peak memory", memory.peak_mb, f"that of {few:,}", grown, "none", 0, "MB"),
        row(f"{whole}: rows counted", alignment.source.count, "rows of the plan", counted, "1x", 0, "rows"),
        row(f"{whole}: error of the mean", apart, "1e-12", apart / 1e-12, "1x at most", 0, ""),
    ]
    report(lines, options.json, machine(()), num_rows=many, few=few, rounds=rounds, seconds=seconds)
