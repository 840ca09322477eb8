"""Shards of float16 rows on disk, written by processes of their own: a peak of memory is that of all one has done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DIM, NUM_SHARDS, SHARD_ROWS = 256, 4, 1_000_000
ITEMSIZE = 2
_WRITE = """
import sys
import numpy as np
seed, count, dim = map(int, sys.argv[2:])
rng = np.random.default_rng(seed)
rows = rng.standard_normal((count, dim), np.float32)
rows += 0.3 * rng.standard_normal(dim, np.float32)
np.save(sys.argv[1], rows.astype(np.float16))
"""


def write_shards(folder: Path, shard_rows: int, dim: int = DIM) -> tuple[list[Path], Path]:
    """Write four shards of text and one of images, and return their paths."""
    paths = [folder / f"text_{number}.npy" for number in range(NUM_SHARDS)]
    for seed, path in enumerate([*paths, folder / "image.npy"]):
        subprocess.run([sys.executable, "-c", _WRITE, path, str(seed), str(shard_rows), str(dim)], check=True)
    return paths, folder / "image.npy"
