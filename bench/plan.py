"""How long a fit and an apply will take on other machines, from rates measured on this one, and what bounds them.

    python bench/plan.py --rows 1e9 --dim 1280 --dtype float16 --machines 8 --disk-gb-per-s 3 --network-gb-per-s 10

The other machines are taken to have processors and memory like this one's. Each reads an equal share of the shards,
from its own disk or, with `--shards remote`, over the network. A fit reads the images once and the text twice, an apply
reads the text once and writes as much; kernels work while files are read, so that the slower of the two counts. What
all machines exchange are sums, a few kilobytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _memory import touch

from realign_fast._dtypes import storage
from realign_fast.alignment import gather_moments
from realign_fast.benchmark import rows_of

PROBE_BYTES = 512 << 20, 2048 << 20
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Rates:
    """Of this machine, files in its page cache: bytes a second of each read, and the least seconds of a command."""

    first_read: float
    second_read: float
    apply: float
    start_fit_s: float
    start_apply_s: float


@dataclass(frozen=True)
class Job:
    """What is to be done, and where. Speeds are bytes a second of one machine; None: it is never waited for."""

    rows: int
    images: int
    dim: int
    itemsize: int
    machines: int = 1
    disk: float | None = None
    network: float | None = None
    remote: bool = False


@dataclass(frozen=True)
class Step:
    """A part of a job, the seconds that each of what it needs would take alone, and what bounds it."""

    name: str
    seconds_by: dict[str, float]

    @property
    def seconds(self) -> float:
        """What it takes, all of it going on at once."""
        return max(self.seconds_by.values())

    @property
    def bound(self) -> str:
        """What it waits for."""
        return max(self.seconds_by, key=lambda name: self.seconds_by[name])


def predict(job: Job, rates: Rates) -> dict[str, list[Step]]:
    """Return the steps of a fit and of an apply."""
    text, image = (count * job.dim * job.itemsize / job.machines for count in (job.rows, job.images))
    sums = 2 * job.dim * 8 * (job.machines - 1) / job.machines

    def read(name: str, num_bytes: float, rate: float, written: float = 0.0) -> Step:
        by = {"kernels and memory": num_bytes / rate}
        local = written if job.remote else num_bytes + written
        if job.disk and local:
            by["disk"] = local / job.disk
        if job.network and job.remote:
            by["network"] = num_bytes / job.network
        return Step(name, by)

    def waited(name: str, seconds: float) -> Step:
        return Step(name, {"start": seconds})

    together = [Step("sums of all machines", {"network": 3 * sums / job.network})] if job.network and sums else []
    return {
        "fit": [
            waited("start", rates.start_fit_s),
            read("text, first read", text, rates.first_read),
            read("images", image, rates.first_read),
            read("text, second read", text, rates.second_read),
            *together,
        ],
        "apply": [waited("start", rates.start_apply_s), read("read, map, write", text, rates.apply, written=text)],
    }


def write_sides(folder: Path, count: int, dim: int, dtype: str, num_shards: int = 2) -> None:
    for side in ("text", "image"):
        (folder / side).mkdir()
        rows = rows_of(count // num_shards, dim, dtype)
        rows += np.asarray(0.01 if side == "text" else -0.01, rows.dtype)
        for number in range(num_shards):
            np.save(folder / side / f"{number}.npy", rows)


def seconds_of(*parts: object) -> float:
    command = [sys.executable, "-m", "realign_fast", *map(str, parts)]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def commands(folder: Path) -> tuple[float, float]:
    """Return the seconds of `realign fit` and `realign apply`, with memory to write to."""
    alignment, out = folder / "a.safetensors", folder / "out"
    took = seconds_of("fit", folder / "text", folder / "image", "-o", alignment)
    touch(folder, folder / "text")
    return took, seconds_of("apply", alignment, folder / "text", "-o", out, "--overwrite")


def probe(place: Path | None, dim: int, dtype: str, rounds: int = 3) -> Rates:
    """Return the rates of this machine for rows of this kind; `place` should lie in memory, such as /dev/shm.

    From two sizes: what does not grow with them is the start.
    """
    sizes, took = [], []
    for num_bytes in PROBE_BYTES:
        count = num_bytes // (dim * storage(dtype).itemsize)
        with tempfile.TemporaryDirectory(dir=place) as name:
            folder = Path(name)
            write_sides(folder, count, dim, dtype)
            times = []
            for _ in range(rounds + 1):  # the first does not count
                begin = time.perf_counter()
                gather_moments(folder / "text")
                times.append((time.perf_counter() - begin, *commands(folder)))
        sizes.append(count * dim * storage(dtype).itemsize)
        took.append(np.median(times[1:], axis=0))
    first, of_fit, of_apply = (took[1] - took[0]) / (sizes[1] - sizes[0])
    starts = took[0] - sizes[0] * np.array([first, of_fit, of_apply])
    return Rates(1 / first, 1 / (of_fit - 2 * first), 1 / of_apply, float(starts[1]), float(starts[2]))


def show(steps: dict[str, list[Step]]) -> None:
    for command, parts in steps.items():
        total = sum(step.seconds for step in parts)
        slowest = max(parts, key=lambda step: step.seconds)
        print(f"realign {command}: {total:,.1f} s, bound by {slowest.bound}")
        for step in parts:
            by = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in step.seconds_by.items())
            print(f"  {step.name:22} {step.seconds:10,.1f} s  ({by})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, required=True, help="of text")
    parser.add_argument("--images", type=float, help="rows of images; default: as many as of text")
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--disk-gb-per-s", type=float, help="of each machine, reading and writing together")
    parser.add_argument("--network-gb-per-s", type=float, help="of each machine")
    parser.add_argument("--shards", choices=("local", "remote"), default="local")
    parser.add_argument(
        "--folder", type=Path, help="where four gigabytes are written to measure rates; default: /dev/shm"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shm = Path("/dev/shm")
    rates = probe(options.folder or (shm if shm.is_dir() else None), options.dim, options.dtype)
    job = Job(
        int(options.rows),
        int(options.images or options.rows),
        options.dim,
        storage(options.dtype).itemsize,
        options.machines,
        options.disk_gb_per_s and options.disk_gb_per_s * 1e9,
        options.network_gb_per_s and options.network_gb_per_s * 1e9,
        options.shards == "remote",
    )
    print(
        f"this machine: first read {rates.first_read / 1e9:.1f} GB/s, second {rates.second_read / 1e9:.1f} GB/s, "
        f"apply {rates.apply / 1e9:.1f} GB/s"
    )
    steps = predict(job, rates)
    show(steps)
    if options.json:
        parts = {command: {step.name: step.seconds_by for step in each} for command, each in steps.items()}
        options.json.write_text(json.dumps(parts, indent=1) + "\n")
