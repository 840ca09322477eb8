"""Two processes of one thread against one process of two: a fit of files in the page cache."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _tables import arguments, report, row
from soak import DIM, ITEMSIZE, SHARD_ROWS, write_shards

from realign_fast.benchmark import machine, summarise

FIT = str(Path(__file__).with_name("_rank_fit.py"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def seconds_of(launcher: tuple[str, ...], threads: int, *arguments: object) -> float:
    command = [sys.executable, *launcher, FIT, str(threads), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--folder", help="where the shards are written for the time of the run")
    options = parser.parse_args()
    shard_rows, repeats, rounds = (10_000, 1, 2) if options.quick else (SHARD_ROWS, 10, 5)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths, image = write_shards(Path(folder), shard_rows)
        times: dict[str, list[float]] = {"two": [], "one": []}
        for _ in range(rounds):
            times["two"].append(seconds_of(TORCHRUN, 1, repeats, image, *paths))
            times["one"].append(seconds_of((), 2, repeats, image, *paths))
    found = {name: summarise(each) for name, each in times.items()}
    count = len(paths) * repeats * shard_rows
    gigabytes = (2 * count + shard_rows) * DIM * ITEMSIZE / 1e9
    ratio = found["one"]["median_s"] / found["two"]["median_s"]
    line = row(
        f"fit in 2 processes of 1 thread, {count:,} x {DIM} float16",
        gigabytes / found["two"]["median_s"],
        "1 process of 2 threads",
        ratio,
        "0.95x",
        found["two"]["spread"],
        "GB/s",
    )
    report([line], options.json, machine(("torch",)), rounds=rounds, count=count)
