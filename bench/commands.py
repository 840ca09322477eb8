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

sys.path.insert(0, str(Path(__file__).parent))
from _tables import arguments, report, row

from realign_fast.benchmark import machine, summarise

HERE = Path(__file__).parent
DIM = 768
SHARD_ROWS = 50_000


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
    apply, _ = timed(realign("apply", folder / "a.safetensors", folder / "text", "-o", folder / "out"))
    return fit + apply


def floor(folder: Path) -> float:
    """Return the seconds of what both commands cannot do without."""
    shutil.rmtree(folder / "floor", ignore_errors=True)
    script = [sys.executable, str(HERE / "_floor.py"), str(folder / "text"), str(folder / "image")]
    return timed(script)[0] + timed([*script, str(folder / "floor")])[0]


def on_tmpfs(num_rows: int, rounds: int) -> list[dict]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        for seed, side in enumerate(("text", "image")):
            make_shards(folder / side, num_rows, seed)
            make_pickles(folder / side, folder / f"{side}-pickles")
        ours, theirs, floors = [], [], []
        for _ in range(rounds):
            ours.append(fit_and_apply(folder))
            floors.append(floor(folder))
            shutil.rmtree(folder / "out-pickles", ignore_errors=True)
            script = [sys.executable, str(HERE / "_authors_way.py")]
            theirs.append(timed([*script, *(str(folder / f"{side}-pickles") for side in ("text", "image", "out"))])[0])
    mine, published, least = (summarise(times)["median_s"] for times in (ours, theirs, floors))
    spread = summarise(ours)["spread"]
    what = f"fit + apply, {num_rows:,} x {DIM} float32, tmpfs"
    return [
        row(what, mine, "the published way, from pickles", published / mine, "40x", spread, "s"),
        row(what, mine, "two starts of Python, and the reads and writes alone", least / mine, "none", spread, "s"),
        row(
            "two starts of Python, and the reads and writes alone",
            least,
            "the published way, from pickles",
            published / least,
            "none",
            summarise(floors)["spread"],
            "s",
        ),
    ]


def on_disk(num_rows: int, rounds: int, place: Path | None) -> list[dict]:
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        for seed, side in enumerate(("text", "image")):
            make_shards(folder / side, num_rows, seed)
        sides = folder / "text", folder / "image"
        ours, copies, reads = [], [], []
        for _ in range(rounds):
            forget(*sides)
            reads.append(timed(["sh", "-c", f"cat {folder}/text/* {folder}/image/* > /dev/null"])[0])
            forget(*sides)
            ours.append(fit_and_apply(folder))
            shutil.rmtree(folder / "copy", ignore_errors=True)
            copies.append(timed(["sh", "-c", f"cp -r {folder}/out {folder}/copy && sync {folder}/copy/*"])[0])
    mine, copy, read = (summarise(times)["median_s"] for times in (ours, copies, reads))
    limit = copy + read
    what = f"fit + apply, {num_rows:,} x {DIM} float32, disk"
    peer = "cp and sync of the outputs, plus cat of the inputs"
    return [row(what, mine, peer, limit / mine, "0.77x (1.3x its time)", summarise(ours)["spread"], "s")]


def memory(num_bytes: int, place: Path | None) -> list[dict]:
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        for seed, side in enumerate(("text", "image")):
            make_shards(folder / side, num_bytes // 2 // (4 * DIM), seed)
        found = {
            "fit": timed(realign("fit", folder / "text", folder / "image", "-o", folder / "a.safetensors"))[1],
        }
        for path in (folder / "image").iterdir():
            path.rename(folder / "text" / f"more_{path.name}")
        found["apply"] = timed(realign("apply", folder / "a.safetensors", folder / "text", "-o", folder / "out"))[1]
    return [
        row(
            f"peak memory of {name}, {num_bytes / 1e9:.1f} GB of shards",
            peak,
            "600 MB",
            peak / 600,
            "1x at most",
            0,
            "MB",
        )
        for name, peak in found.items()
    ]


def start(rounds: int) -> list[dict]:
    cases = {
        "numpy": [sys.executable, "-c", "import numpy"],
        "ours": [sys.executable, "-c", "import realign_fast"],
        "loaded": [sys.executable, "-c", "from realign_fast import fit"],
        "help": realign("--help"),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, command in cases.items():
            times[name].append(timed(command)[0])
    found = {name: summarise(values[1:]) for name, values in times.items()}
    numpy = found["numpy"]["median_s"]
    return [
        row(what, found[name]["median_s"], peer, found[name]["median_s"] / limit, goal, found[name]["spread"], "s")
        for what, name, peer, limit, goal in (
            ("import realign_fast", "ours", "import numpy", numpy, "1.5x at most"),
            ("from realign_fast import fit", "loaded", "import numpy", numpy, "none"),
            ("realign --help", "help", "0.4 s", 0.4, "1x at most"),
        )
    ]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--disk", type=Path, help="a folder on the disk to measure; default: that of temporary files")
    options = parser.parse_args()
    num_rows, rounds, num_bytes = (20_000, 1, 200_000_000) if options.quick else (300_000, 5, 8_000_000_000)
    lines = [
        *start(3 if options.quick else 15),
        *on_tmpfs(num_rows, rounds),
        *on_disk(num_rows, rounds, options.disk),
        *memory(num_bytes, options.disk),
    ]
    report(lines, options.json, machine(), num_rows=num_rows, rounds=rounds)
