"""`realign fit` and `realign apply` as commands: against the published way and `cp`, their memory and their start."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from _memory import touch

CHECKED_BY = ("test_cli.py",)
HERE = Path(__file__).parent
DIM = 768
SHARD_ROWS = 50_000
PUBLISHED = "the published way, from pickles"
FLOOR = "two starts of Python, and the reads and writes alone"


def make_shards(folder: Path, num_rows: int, seed: int) -> None:
    """Write unit rows around a direction of their own as npy shards."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=DIM).astype(np.float32) / np.float32(np.sqrt(DIM))
    for index, start in enumerate(range(0, num_rows, SHARD_ROWS)):
        rows = centre + rng.standard_normal((min(SHARD_ROWS, num_rows - start), DIM), np.float32) / np.float32(
            np.sqrt(DIM)
        )
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.save(folder / f"shard_{index}.npy", rows)


def make_pickles(shards: Path, folder: Path) -> None:
    folder.mkdir()
    for path in sorted(shards.glob("*.npy")):
        rows = np.load(path)
        with (folder / path.with_suffix(".pkl").name).open("wb") as file:
            pickle.dump([{"id": i, "embed": values} for i, values in enumerate(rows)], file, protocol=4)


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds and the peak of its resident memory in MB."""
    done = subprocess.run([sys.executable, HERE / "_run.py", *command], stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak_bytes = done.stdout.split()
    return float(seconds), float(peak_bytes) / 1e6


def realign(*parts: object) -> list[str]:
    return [sys.executable, "-m", "realign_fast", *map(str, parts)]


def forget(*folders: Path) -> None:
    """Take the files out of the page cache, so that the next read comes from the disk."""
    for folder in folders:
        for path in folder.iterdir():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def fit_and_apply(folder: Path) -> float:
    shutil.rmtree(folder / "out", ignore_errors=True)
    fit, _ = timed(realign("fit", folder / "text", folder / "image", "-o", folder / "a.safetensors"))
    touch(folder, folder / "text")
    apply, _ = timed(realign("apply", folder / "a.safetensors", folder / "text", "-o", folder / "out"))
    return fit + apply


def floor(folder: Path) -> float:
    """Return the seconds of what both commands cannot do without."""
    script = [sys.executable, str(HERE / "_floor.py"), str(folder / "text"), str(folder / "image")]
    fit, _ = timed(script)
    touch(folder, folder / "text")
    apply, _ = timed([*script, str(folder / "floor")])
    return fit + apply


def published(folder: Path) -> float:
    script = [sys.executable, str(HERE / "_authors_way.py")]
    touch(folder, folder / "text-pickles")
    return timed([*script, *(str(folder / f"{side}-pickles") for side in ("text", "image", "out"))])[0]


def compare_on_tmpfs(measure, num_rows: int, rounds: int, goal: float) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        for seed, side in enumerate(("text", "image")):
            make_shards(folder / side, num_rows, seed)
            make_pickles(folder / side, folder / f"{side}-pickles")
        ours, theirs, floors = [], [], []
        for _ in range(rounds):
            for run, seconds, out in (
                (fit_and_apply, ours, "out"),
                (floor, floors, "floor"),
                (published, theirs, "out-pickles"),
            ):
                seconds.append(run(folder))
                shutil.rmtree(folder / out)
    about = {"unit": "s", "dtype": "float32", "shape": (num_rows, DIM), "note": "tmpfs"}
    measure.times(
        "fit and apply",
        ours,
        {PUBLISHED: theirs, FLOOR: floors},
        goals={PUBLISHED: goal},
        why={
            PUBLISHED: "two starts of Python that only move the bytes stand no higher than the goal, or below it",
            FLOOR: "the peer only moves the bytes: a fit also adds up what it reads, an apply maps and hashes",
        },
        **about,
    )
    measure.times(FLOOR, floors, {PUBLISHED: theirs}, **about)


def test_on_tmpfs(measure, pick):
    compare_on_tmpfs(measure, pick(20_000, 100_000, 300_000), pick(1, 1, 5), 40.0)


@pytest.mark.slow
def test_on_tmpfs_of_a_million(measure, pick):
    compare_on_tmpfs(measure, pick(20_000, 1_000_000, 1_000_000), pick(1, 1, 2), 60.0)


def test_on_disk(measure, pick, folder):
    num_rows = pick(20_000, 100_000, 300_000)
    for seed, side in enumerate(("text", "image")):
        make_shards(folder / side, num_rows, seed)
    sides = folder / "text", folder / "image"
    ours, limit = [], []
    for _ in range(pick(1, 2, 5)):
        forget(*sides)
        read = timed(["sh", "-c", f"cat {folder}/text/* {folder}/image/* > /dev/null"])[0]
        forget(*sides)
        ours.append(fit_and_apply(folder))
        shutil.rmtree(folder / "copy", ignore_errors=True)
        touch(folder, folder / "out")
        limit.append(read + timed(["sh", "-c", f"cp -r {folder}/out {folder}/copy && sync {folder}/copy/*"])[0])
    peer = "cp and sync of the outputs, plus cat of the inputs"
    about = {"unit": "s", "dtype": "float32", "shape": (num_rows, DIM), "note": "disk"}
    why = {peer: "the peer only moves the bytes; within the goal, 1.3 times its time"}
    measure.times("fit and apply", ours, {peer: limit}, goals={peer: 1 / 1.3}, why=why, **about)


def test_memory(measure, pick, folder):
    num_bytes = pick(200_000_000, 1_000_000_000, 8_000_000_000)
    for seed, side in enumerate(("text", "image")):
        make_shards(folder / side, num_bytes // 2 // (4 * DIM), seed)
    alignment = folder / "a.safetensors"
    found = {"fit": timed(realign("fit", folder / "text", folder / "image", "-o", alignment))[1]}
    for path in (folder / "image").iterdir():
        path.rename(folder / "text" / f"more_{path.name}")
    found["apply"] = timed(realign("apply", alignment, folder / "text", "-o", folder / "out"))[1]
    for name, peak in found.items():
        what = f"peak memory of {name}, {num_bytes / 1e9:.1f} GB of shards"
        measure.figure(what, peak, "MB", "600 MB", peak / 600, goal=1.0, at_most=True)


def test_start(measure, pick):
    cases = {
        "import numpy": [sys.executable, "-c", "import numpy"],
        "import realign_fast": [sys.executable, "-c", "import realign_fast"],
        "from realign_fast import fit": [sys.executable, "-c", "from realign_fast import fit"],
        "realign --help": realign("--help"),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(pick(2, 8, 16)):
        for name, command in cases.items():
            times[name].append(timed(command)[0])
    median = {name: float(np.median(each[1:])) for name, each in times.items()}
    for name, against, limit, goal in (
        ("import realign_fast", "import numpy", median["import numpy"], 1.5),
        ("from realign_fast import fit", "import numpy", median["import numpy"], None),
        ("realign --help", "0.4 s", 0.4, 1.0),
    ):
        measure.figure(name, median[name], "s", against, median[name] / limit, goal=goal, at_most=True)
