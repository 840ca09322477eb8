"""Two processes of one thread against one process of two: a fit of files in the page cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from _shards import DIM, ITEMSIZE, SHARD_ROWS, write_shards

CHECKED_BY = ("test_ranks.py::test_fit_writes_the_same_bytes_in_any_number_of_processes",)
FIT = str(Path(__file__).with_name("_rank_fit.py"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def seconds_of(launcher: tuple[str, ...], threads: int, *arguments: object) -> float:
    """Return the seconds of the fit alone: the start of Python and of the group is not of interest here."""
    command = [sys.executable, *launcher, FIT, str(threads), *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_fit_in_two_processes(measure, pick, folder):
    shard_rows, repeats, rounds = pick(10_000, 250_000, SHARD_ROWS), pick(1, 5, 10), pick(2, 2, 5)
    paths, image = write_shards(folder, shard_rows)
    two, one = [], []
    for _ in range(rounds):
        two.append(seconds_of(TORCHRUN, 1, repeats, image, *paths))
        one.append(seconds_of((), 2, repeats, image, *paths))
    count = len(paths) * repeats * shard_rows
    measure.times(
        "fit in 2 processes of 1 thread",
        two,
        {"1 process of 2 threads": one},
        unit="GB/s",
        work=(2 * count + shard_rows) * DIM * ITEMSIZE,
        goals={"1 process of 2 threads": 0.95},
        dtype="float16",
        shape=(count, DIM),
    )
