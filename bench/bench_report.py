"""`realign report` over a million rows a side: its time, that of each further method, and its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CHECKED_BY = ("test_report.py",)
DIM, SHARD_ROWS = 768, 100_000
WRITE = """
import sys
import numpy as np
folder, num_rows, shard_rows, dim = sys.argv[1], *map(int, sys.argv[2:])
rng = np.random.default_rng(0)
# Spectra that decay, clouds apart, and pairs that have something in common; of the sizes that encoders give.
scales = np.arange(1, dim + 1, dtype=np.float32) ** -0.6
scales *= 0.45 / np.linalg.norm(scales)
means = {side: 0.75 * rng.standard_normal(dim, np.float32) / dim**0.5 for side in ("text", "image")}
for number, start in enumerate(range(0, num_rows, shard_rows)):
    shared = rng.standard_normal((min(shard_rows, num_rows - start), dim), np.float32)
    for side, mean in means.items():
        rows = (shared + rng.standard_normal(shared.shape, np.float32)) * scales + mean
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.save(f"{folder}/{side}_{number}.npy", rows.astype(np.float16))
"""


def timed(folder: Path, methods: str, num_rows: int) -> tuple[float, float, dict]:
    """Return seconds, peak memory in bytes, and the report."""
    output = folder / f"report_{methods.replace(',', '_')}"
    command = [sys.executable, "-m", "realign_fast", "report", f"{folder}/text_*.npy", f"{folder}/image_*.npy"]
    options = ["--paired", "--rows", str(num_rows), "--methods", methods, "-o", str(output)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024, json.loads((output / "report.json").read_text())


def test_report(measure, pick, folder):
    num_rows, sample = pick(6_000, 100_000, 1_000_000), pick(500, 5_000, 20_000)
    shard_rows = min(SHARD_ROWS, num_rows // 4)
    subprocess.run([sys.executable, "-c", WRITE, folder, str(num_rows), str(shard_rows), str(DIM)], check=True)
    one, memory, found = timed(folder, "realign", sample)
    _, memory_of_all, of_all = timed(folder, "realign,c3,coral,ot", sample)
    what = (
        f"realign report, {num_rows:,} pairs x {DIM} float16, {found['measured_on']['sample']:,} rows a side for k-NN"
    )
    peak = max(memory, memory_of_all)
    held = {"goal": 1.0, "at_most": True}
    measure.figure(what, one, "s", "240 s", one / 240, **held)
    measure.figure(f"{what}: memory", peak / 1e6, "MB", "2000 MB", peak / 2e9, **held)
    for entry in of_all["methods"][2:]:
        measure.figure(f"{what}: {entry['name']} beside", entry["seconds"], "s", "60 s", entry["seconds"] / 60, **held)
