"""Loaders over files in the page cache: what the alignment costs in them, and rows by number and by id."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from torch.utils.data import DataLoader

from realign_fast import _C, fit
from realign_fast._transform import Steps
from realign_fast.backends import count_threads
from realign_fast.benchmark import rows_of
from realign_fast.data import EmbeddingDataset, EmbeddingStream, _Memory
from realign_fast.io._random import RandomRows

CHECKED_BY = ("test_data.py",)
DIM, BATCH, SHARD_ROWS = 768, 8192, 500_000
PLAIN, LOOP = "without alignment", "a plain readinto loop"
WHY = {PLAIN: "reading alone keeps the cores busy, and mapping comes on top; a training step beside it hides that"}


def write_shards(folder: Path, count: int, dim: int) -> list[Path]:
    """Write `count` rows of float16; the rows of a shard are drawn once."""
    shard_rows = min(count, SHARD_ROWS)
    rows = rows_of(shard_rows, dim, "float16")
    paths = [folder / f"part_{number}.npy" for number in range(count // shard_rows)]
    for path in paths:
        np.save(path, rows)
    return paths


def alignment_of(dim: int):
    text, image = (rows_of(5000, dim, "float32") + offset for offset in (0.01, -0.01))
    return fit(text, image)


def through(paths: list[Path], alignment, workers: int, shuffle: bool = False) -> Callable[[], None]:
    stream = EmbeddingStream(paths, alignment, BATCH, shuffle)
    loader = DataLoader(stream, batch_size=None, num_workers=workers, persistent_workers=workers > 0)

    def run() -> None:
        for _ in loader:
            pass

    return run


def read_into(paths: list[Path]) -> None:
    buffer = bytearray(BATCH * DIM * 2)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


@pytest.fixture(scope="module")
def paths(pick, request, tmp_path_factory):
    with tempfile.TemporaryDirectory(dir=request.config.option.folder) as name:
        yield write_shards(Path(name), pick(20_000, 1_000_000, 10_000_000), DIM)


def about(paths: list[Path], pick) -> dict:
    count = pick(20_000, 1_000_000, 10_000_000)
    return {"unit": "GB/s", "work": 2 * count * DIM, "dtype": "float16", "shape": (count, DIM), "rounds": pick(3, 3, 5)}


def test_stream(measure, pick, paths):
    measure(
        "EmbeddingStream",
        through(paths, None, 0),
        {LOOP: lambda: read_into(paths)},
        goals={LOOP: 0.8},
        why={LOOP: "a batch has memory of its own, where the loop has one buffer"},
        **about(paths, pick),
    )


@pytest.mark.parametrize("shuffle", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in order", "shuffled"])
@pytest.mark.parametrize("workers", [0, 2])
def test_alignment_in_a_stream(measure, pick, paths, workers, shuffle):
    measure(
        f"EmbeddingStream{' shuffled' if shuffle else ''} with alignment",
        through(paths, alignment_of(DIM), workers, shuffle),
        {PLAIN: through(paths, None, workers, shuffle)},
        note=f"{workers} workers",
        goals={} if shuffle else {PLAIN: 0.97},
        why=WHY,
        **about(paths, pick),
    )


def test_mapping_alone(measure, pick, paths):
    """The same files into the memory of three batches by turns, as loaders use it: mapped, or as they are."""
    rows, count, threads = RandomRows(paths), pick(20_000, 1_000_000, 10_000_000), count_threads(None)
    row_map = Steps.of(alignment_of(DIM).parameters).table[0].row_map
    memory = _Memory()
    turns = [memory.new((BATCH, DIM), rows.dtype)[1] for _ in range(3)]

    def read(row_map: _C.RowMap | None) -> None:
        for number, start in enumerate(range(0, count, BATCH)):
            rows.read_range(start, turns[number % 3][: count - start], threads, row_map)

    alone = "reading alone"
    measure(
        "files mapped into memory, without a loader",
        lambda: read(row_map),
        {alone: lambda: read(None)},
        why={alone: "two cores multiply and convert as long as the memory moves the bytes, and overlap them in part"},
        **about(paths, pick),
    )


def test_rows_by_id(measure, pick, folder):
    count = pick(20_000, 1_000_000, 10_000_000)
    paths = write_shards(folder, count, 256)
    names = pa.array(f"{number:09}.jpg" for number in range(count))
    parquet.write_table(pa.table({"id": names}), folder / "ids.parquet")
    options = {"ids": folder / "ids.parquet", "index": folder / "ids.index"}
    EmbeddingDataset(paths, **options)[0]
    opened = []
    for _ in range(pick(2, 5, 9)):
        begin = time.perf_counter()
        data = EmbeddingDataset(paths, **options)
        opened.append(time.perf_counter() - begin)
    rng = np.random.default_rng(0)
    wanted = [f"{number:09}.jpg" for number in rng.integers(count, size=20_480)]
    alone = "a row by itself is one read, and the rest of its time some twenty calls of Python and torch"
    for what, size, least, why in (("1,024 ids at a time", 1024, 200_000, ""), ("one id at a time", 1, 50_000, alone)):
        seconds = []
        for _ in range(pick(2, 5, 9)):
            begin = time.perf_counter()
            for start in range(0, len(wanted), size):
                data.__getitems__(wanted[start : start + size]) if size > 1 else data[wanted[start]]
            seconds.append(time.perf_counter() - begin)
        rate = len(wanted) / float(np.median(seconds))
        what = f"EmbeddingDataset by id, {count:,} x 256 float16, {what}"
        measure.figure(what, rate, "rows/s", f"{least:,} rows/s", rate / least, goal=1.0, why=why)
    what, seconds = f"opening an index of {count:,} ids", float(np.median(opened))
    measure.figure(what, seconds * 1e3, "ms", "50 ms", seconds / 0.05, goal=1.0, at_most=True)
