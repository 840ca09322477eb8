"""The kernels timed against this machine's own read and copy speed: `realign bench`, and the ground of `bench/`.

What is compared runs in turn, round after round in one process, and stands as a ratio of medians: the machine's mood
then falls on both sides alike.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._dtypes import DTYPES, empty, storage
from ._native import _C
from ._os import memory_bytes
from ._progress import say
from ._version import __version__
from .backends import count_threads

__all__ = ["interleave", "kernel_cases", "machine", "rows_of", "run", "summarise"]

DIMS = (512, 768, 1024, 1280, 4096)
_BYTES, _QUICK_BYTES = 1 << 30, 64 << 20
_PAUSE_S = 0.02


def interleave(cases: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Return the seconds a call of each of the `cases` took in each of `rounds` rounds, after one that is not counted.

    Short cases are called many times in a round, `calls`, so that each finds the caches as it leaves them. A pause
    before each lets the threads of the case before go to sleep: they look for work for some milliseconds and hold their
    cores.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, run in cases.items():
            time.sleep(_PAUSE_S)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: times[1:] for name, times in seconds.items()}


def summarise(times: list[float]) -> dict[str, float]:
    """Return `median_s` of times in seconds, and `spread`, half the distance of the quartiles over the median."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"median_s": float(median), "spread": float((high - low) / 2 / median)}


def machine(packages: tuple[str, ...] = ("pyarrow",)) -> dict[str, Any]:
    """Return what a figure must not be read without: processor, cores, instruction set, versions of `packages`."""
    model, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        model, flags = fields.get("model name", model), fields.get("flags", "")
    versions = {"realign-fast": __version__, "python": platform.python_version(), "numpy": np.__version__}
    for package in ("torch", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    memory = memory_bytes()
    return {
        "processor": model,
        "cores": count_threads(None),
        "memory_gb": None if memory is None else round(memory / 1e9, 1),
        "instruction_set": _C.instruction_set(),
        "vector_flags": [
            flag for flag in flags.split() if flag.startswith(("avx", "fma", "f16c", "amx", "asimd", "sve"))
        ],
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


def rows_of(count: int, dim: int, dtype: str) -> NDArray[Any]:
    """Return `(count, dim)` rows of `dtype`, bfloat16 as uint16, in memory of their own, none of them zero."""
    pattern = np.random.default_rng(0).normal(0.02, 1 / np.sqrt(dim), (min(count, 1024), dim)).astype(np.float32)
    if dtype == "bfloat16":
        pattern = (pattern.view(np.uint32) >> 16).astype(np.uint16)
    else:
        pattern = pattern.astype(storage(dtype))
    rows = empty((count, dim), pattern.dtype)
    rows[:] = np.resize(pattern, (count, dim))
    return rows


def kernel_cases(rows: NDArray[Any], out: NDArray[Any], dtype: str, threads: int) -> dict[str, Callable[[], object]]:
    """Return one call of each kernel, and of each measure of the machine, by name.

    They read `rows` `(n, dim)` of `dtype` and write into `out`, which is like them, with so many `threads`.
    """
    dim = rows.shape[1]
    sums = np.zeros(dim, np.int64)
    rng = np.random.default_rng(1)
    row_map = _C.RowMap(1.1, *(factor * rng.normal(size=dim) / np.sqrt(dim) for factor in (0.5, 0.1)))
    bfloat16 = dtype == "bfloat16"
    return {
        "read": lambda: _C.stream_read(rows, threads),
        "copy": lambda: _C.stream_copy(rows, out, False, threads),
        "streamed copy": lambda: _C.stream_copy(rows, out, True, threads),
        "moments": lambda: _C.moments(rows, bfloat16, sums, None, threads),
        "row_transform": lambda: _C.row_transform(rows, bfloat16, out, bfloat16, row_map, threads),
    }


def run(*, quick: bool = False) -> dict[str, Any]:
    """Time the kernels for each dtype and several dimensions; print a table on stderr and return it.

    Parameters
    ----------
    quick
        One dimension and fewer rounds, for a first look.

    Returns
    -------
    dict
        `machine`, and `kernels`: a row each with `kernel`, `dtype`, `dim`, `rows`, `median_s`, `spread`, `gb_per_s` of
        bytes that must cross the memory, and `share`, the speed over that of the fastest plain read or copy.
    """
    threads = count_threads(None)
    total_bytes = _QUICK_BYTES if quick else _BYTES
    lines = []
    say(f"{'kernel':14} {'dtype':9} {'dim':>5} {'GB/s':>7} {'share':>6} {'spread':>7}")
    for dim in (768,) if quick else DIMS:
        for dtype in DTYPES:
            count = total_bytes // (dim * storage(dtype).itemsize)
            rows = rows_of(count, dim, dtype)
            out = empty(rows.shape, rows.dtype)
            out.fill(0)
            times = interleave(kernel_cases(rows, out, dtype, threads), 3 if quick else 5)
            found = {name: summarise(seconds) for name, seconds in times.items()}
            limits = {
                "moments": found["read"]["median_s"],
                "row_transform": min(found["copy"]["median_s"], found["streamed copy"]["median_s"]),
            }
            for kernel, limit in limits.items():
                median = found[kernel]["median_s"]
                crossings = 1 if kernel == "moments" else 2
                line = {
                    "kernel": kernel,
                    "dtype": dtype,
                    "dim": dim,
                    "rows": count,
                    **found[kernel],
                    "gb_per_s": crossings * rows.nbytes / median / 1e9,
                    "share": limit / median,
                }
                lines.append(line)
                say(f"{kernel:14} {dtype:9} {dim:5} {line['gb_per_s']:7.1f} {line['share']:6.2f} {line['spread']:7.1%}")
    return {"machine": machine(), "kernels": lines}
