"""A fit of a billion rows: its speed against a sum over the same files, its memory, and whether it counts them all.

The plan names a few shards again and again, so that all of it lies in the page cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from _shards import DIM, ITEMSIZE, SHARD_ROWS, write_shards

from realign_fast import _C, Moments, fit
from realign_fast.backends import count_threads

CHECKED_BY = ("test_moments.py", "test_alignment.py")
PEER = "a sum over the same mapped files, on all cores"
WHY = {PEER: "the peer only adds; a fit multiplies a row three times in each of its two reads, and makes integers"}


def sum_over(paths: list[Path]) -> None:
    """Read the files as they lie, mapped, with all cores: no more than the adding up of their words."""
    for path in paths:
        _C.stream_read(np.load(path, mmap_mode="r").view(np.uint8).reshape(-1), count_threads(None))


def fitted(repeats: int, image: Path, paths: list[Path]) -> dict:
    command = [sys.executable, str(Path(__file__).with_name("_soak_fit.py")), str(repeats), image, *paths]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_a_billion_rows(measure, pick, folder):
    shard_rows, few, many = pick(10_000, SHARD_ROWS // 2, SHARD_ROWS), pick(2, 2, 25), pick(5, 5, 250)
    paths, image = write_shards(folder, shard_rows)
    rows = {repeats: repeats * len(paths) * shard_rows for repeats in (few, many)}
    # Such a fit reads the images once and the text twice.
    read = {repeats: (2 * count + shard_rows) * DIM * ITEMSIZE for repeats, count in rows.items()}
    about = {"unit": "GB/s", "dtype": "float16", "why": WHY}
    found, sums = {few: [], many: []}, []
    for repeats in pick((few, many), (few, few, many), (few, few, few, many, few)):
        begin = time.perf_counter()
        sum_over([*paths * (2 * few), image])
        sums.append(time.perf_counter() - begin)
        found[repeats].append(fitted(repeats, image, paths))
    for repeats, goals in ((few, {}), (many, {PEER: 0.7})):
        against = [seconds * read[repeats] / read[few] for seconds in sums]
        times = [each["seconds"] for each in found[repeats]]
        measure.times(
            "fit", times, {PEER: against}, work=read[repeats], shape=(rows[repeats], DIM), goals=goals, **about
        )
    whole, last = f"fit of {rows[many]:,} rows", found[many][0]
    row, row_of_few = last["seconds"] / rows[many], float(np.median([e["seconds"] for e in found[few]])) / rows[few]
    peak, peak_of_few = last["peak_bytes"] / 1e6, max(each["peak_bytes"] for each in found[few]) / 1e6
    held = {"goal": 1.0, "at_most": True}
    measure.figure(f"{whole}: a row", row * 1e9, "ns", f"of {rows[few]:,}", row / row_of_few, goal=1.05, at_most=True)
    measure.figure(f"{whole}: peak memory", peak, "MB", "600 MB", peak / 600, **held)
    measure.figure(f"{whole}: peak memory", peak, "MB", f"that of {rows[few]:,}", peak / peak_of_few)
    counted = last["count"]
    measure.figure(f"{whole}: rows counted", counted, "rows", "rows of the plan", counted / rows[many], goal=1.0)
    measure.figure(f"{whole}: error of the mean", last["error"], "", "1e-12", last["error"] / 1e-12, **held)


@pytest.mark.parametrize("which", ["first", "second"])
def test_reads_from_memory(measure, pick, which):
    """The two reads of a fit without files: the rest is the mapping of them. And without memory: the arithmetic."""
    at_once = 16_384  # so many that the start of a call is nothing
    count = at_once * pick(1, 125, 250)
    rows = np.resize(np.random.default_rng(0).standard_normal((1024, DIM), np.float32).astype(np.float16), (count, DIM))
    alignment, moments = fit(rows[:5000], -rows[:5000]), Moments(DIM)
    sums = np.zeros(DIM + _C.NUM_FACTORS, np.int64)
    # A fit's second read is of the map without the correction, which it finds.
    row_map = _C.RowMap(float(alignment.scale), alignment.shift, np.zeros_like(alignment.correction))
    read = {
        "first": moments.update,
        "second": lambda rows: _C.transformed_moments(rows, False, row_map, sums, count_threads(None)),
    }[which]
    measure(
        f"{which} read of a fit, from memory",
        lambda: read(rows),
        {
            "a sum of the same memory": lambda: _C.stream_read(rows, count_threads(None)),
            "as many rows that lie in the cache": lambda: [read(rows[:at_once]) for _ in range(count // at_once)],
        },
        unit="GB/s",
        work=rows.nbytes,
        limit="read",
        dtype="float16",
        shape=rows.shape,
        why={"a sum of the same memory": WHY[PEER]},
    )
