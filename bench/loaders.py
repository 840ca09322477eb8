"""Loaders over files in the page cache: what the alignment costs in them, and rows by number and by id."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from _tables import arguments, report, row

from realign_fast import fit
from realign_fast.benchmark import interleave, machine, rows_of, summarise
from realign_fast.data import EmbeddingDataset, EmbeddingStream

DIM, BATCH, SHARD_ROWS = 768, 8192, 500_000


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


def streams(folder: Path, count: int, rounds: int) -> list[dict]:
    paths, alignment = write_shards(folder, count, DIM), alignment_of(DIM)

    def run(loader) -> Callable[[], None]:
        def through() -> None:
            for _ in loader:
                pass

        return through

    def loader(num_workers: int, aligned: bool, shuffle: bool = False):
        stream = EmbeddingStream(paths, alignment if aligned else None, BATCH, shuffle)
        return DataLoader(stream, batch_size=None, num_workers=num_workers, persistent_workers=num_workers > 0)

    def readinto() -> None:
        buffer = bytearray(BATCH * DIM * 2)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    cases = {"readinto loop": readinto}
    for workers in (0, 2):
        for shuffle in (False, True):
            for aligned in (False, True):
                cases[f"{workers} {shuffle} {aligned}"] = run(loader(workers, aligned, shuffle))
    found = {name: summarise(times) for name, times in interleave(cases, rounds).items()}

    def line(what: str, case: str, peer: str, against: str, goal: str) -> dict:
        mine = found[case]
        rate = count * DIM * 2 / mine["median_s"] / 1e9
        ratio = found[against]["median_s"] / mine["median_s"]
        return row(
            f"{what}, {count:,} x {DIM} float16, batch {BATCH:,}", rate, peer, ratio, goal, mine["spread"], "GB/s"
        )

    lines = [line("EmbeddingStream", "0 False False", "a plain readinto loop", "readinto loop", "0.8x")]
    for workers in (0, 2):
        for shuffle in (False, True):
            name = f"EmbeddingStream{' shuffled' if shuffle else ''} with alignment, {workers} workers"
            goal = "none" if shuffle else "0.97x"
            case = f"{workers} {shuffle} "
            lines.append(line(name, f"{case}True", "without alignment", f"{case}False", goal))
    return lines


def random_access(folder: Path, count: int) -> list[dict]:
    paths = write_shards(folder, count, 256)
    names = pa.array(f"{number:09}.jpg" for number in range(count))
    parquet.write_table(pa.table({"id": names}), folder / "ids.parquet")
    options = {"ids": folder / "ids.parquet", "index": folder / "ids.index"}
    EmbeddingDataset(paths, **options)[0]
    begin = time.perf_counter()
    data = EmbeddingDataset(paths, **options)
    opened = time.perf_counter() - begin
    rng, lines = np.random.default_rng(0), []
    for what, size, goal in (("1,024 ids at a time", 1024, 200_000), ("one id at a time", 1, 50_000)):
        times = []
        for _ in range(9):
            wanted = [[f"{number:09}.jpg" for number in rng.integers(count, size=size)] for _ in range(20_000 // size)]
            begin = time.perf_counter()
            for each in wanted:
                data.__getitems__(each) if size > 1 else data[each[0]]
            times.append((time.perf_counter() - begin) / (len(wanted) * size))
        mine = summarise(times)
        name = f"EmbeddingDataset by id, {count:,} x 256 float16, {what}"
        lines.append(
            row(
                name,
                1 / mine["median_s"],
                f"{goal:,} rows/s",
                1 / mine["median_s"] / goal,
                "1x",
                mine["spread"],
                "rows/s",
            )
        )
    lines.append(
        row(f"opening an index of {count:,} ids", opened * 1e3, "50 ms", opened / 0.05, "1x at most", 0.0, "ms")
    )
    return lines


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = arguments(__doc__)
    parser.add_argument("--folder", help="where the shards are written for the time of the run")
    parser.add_argument("--rows", type=int, default=10_000_000)
    options = parser.parse_args()
    count, rounds = (20_000, 2) if options.quick else (options.rows, 3)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        lines = streams(Path(folder), count, rounds)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        lines += random_access(Path(folder), count)
    report(lines, options.json, machine(("pyarrow",)), count=count, rounds=rounds)
