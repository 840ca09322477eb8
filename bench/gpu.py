"""Every GPU kernel on this machine: checked against float64, then timed beside its limits and its peers, in 8 minutes.

Nothing need be installed beyond torch, NumPy and Triton. The first two minutes give the verdict on the goals, which are
set for an H200. With TRITON_INTERPRET=1 it runs on the CPU, on small shapes: everything is checked, nothing is timed.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import torch
import triton
from _gpu_cases import Case, Kernel, awkward_rows, kernels_here, plain_rows, row_transform
from _gpu_timing import (
    DEVICE,
    DTYPES,
    GRAPH_CALLS,
    INTERPRETED,
    free_bytes,
    in_graph,
    limits,
    measure,
    median_and_spread,
    warm,
)
from _tables import row, write_json
from _tree import ROOT, Extension

from realign_fast import __version__

# All of it, the first part, and what torch.compile may take for one shape.
SECONDS, VERDICT_SECONDS, COMPILE_SECONDS = 480, 120, 20
DIMS = (96,) if INTERPRETED else (512, 768, 1024, 1280, 4096)
MAIN_DIM, AWKWARD_DIM, WIDE_DIM = (96, 70, 0) if INTERPRETED else (768, 255, 9000)
# The number of rows divides by 16, as those do that are timed: Triton compiles the kernel once for both.
CHECKED_ROWS = 16 if INTERPRETED else 496
COMPILED_KERNELS, COMPILED_DIMS = ("row transform", "moments"), (768, 1280)
GOAL_ROWS = {768: 4_000_000, 1280: 2_000_000}
TABLE_BYTES = 1 << 30
SMALL, SMALL_ROWS, SMALL_DIM = "row transform in a CUDA graph", CHECKED_ROWS if INTERPRETED else 256, MAIN_DIM
# What is a goal in itself, as a peer: its name and seconds, or operations a second.
FIXED_SECONDS = {SMALL: ("12 us", 12e-6)}
FIXED_RATES = {("covariance fast", "bfloat16", 1280): ("500 TFLOP/s", 500e12)}


def goals() -> dict[tuple[str, str, int, str], float]:
    """Return how many times as fast as its peer each (kernel, dtype, dim, peer) should be, the most telling first."""
    found: dict[tuple[str, str, int, str], float] = {}
    for dtype in ("bfloat16", "float32"):
        for dim in (768, 1280):
            for peer, factor in (("copy", 0.9), ("eager torch", 3), ("torch.compile max-autotune", 1)):
                found["row transform", dtype, dim, peer] = factor
    for dtype in ("bfloat16", "float32"):
        found["row transform by domain", dtype, 768, "one domain"] = 0.9
        found["row transform backward", dtype, 768, "copy"] = 0.85
        found["moments", dtype, 768, "read"] = 0.9
    for dim in (768, 1280):
        found["whitening high", "bfloat16", dim, "torch.matmul"] = 0.8
    found["covariance fast", "bfloat16", 1280, "500 TFLOP/s"] = 1
    found["covariance fast", "bfloat16", 1280, "normalize and addmm"] = 1.5
    for dtype in ("bfloat16", "float32"):
        found[SMALL, dtype, 768, "12 us"] = 1
    return found


GOALS = goals()


def machine() -> dict[str, Any]:
    """Return what a figure must not be read without."""
    versions = {"realign-fast": __version__, "python": platform.python_version(), "numpy": np.__version__}
    versions |= {"torch": torch.__version__, "triton": triton.__version__}
    host = {"system": f"{platform.system()} {platform.release()}", "versions": versions}
    if INTERPRETED:
        return {"gpu": "none, Triton's interpreter", **host}
    gpu = torch.cuda.get_device_properties(DEVICE)
    hip = torch.version.hip
    driver = Path("/sys/module/amdgpu/version" if hip else "/proc/driver/nvidia/version")
    return {
        "gpu": gpu.name,
        "memory_gb": round(gpu.total_memory / 1e9, 1),
        "processors": gpu.multi_processor_count,
        "capability": gpu.gcnArchName if hip else f"{gpu.major}.{gpu.minor}",
        "runtime": f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}",
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else "unknown",
        **host,
    }


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def in_units(name: str, value: float) -> str:
    return f"{name} {value / 1e9:.0f} GB/s" if name in ("copy", "read") else f"{name} {value / 1e12:.0f} TFLOP/s"


class Bench:
    """What was found so far, and how long it took."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.kernels = kernels_here()
        self.limits: dict[str, float] = {}
        self.checks: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.start

    def verdict(self) -> None:
        """Check every kernel, measure the limits, and then what has a goal."""
        for name, kernel in self.kernels.items():
            for dtype in kernel.dtypes:
                self.check(name, dtype, MAIN_DIM)
            self.check(name, "float32", AWKWARD_DIM)
            if WIDE_DIM and kernel.module in ("row_transform", "moments"):
                self.check(name, "float32", WIDE_DIM)
        print(f"{sum(check['passed'] for check in self.checks.values())} of {len(self.checks)} checks passed")
        self.limits = limits()
        print("limits:", ", ".join(in_units(*limit) for limit in self.limits.items()), flush=True)
        for name, dtype, dim in dict.fromkeys(key[:3] for key in GOALS):
            with_compiled = self.seconds() < VERDICT_SECONDS - COMPILE_SECONDS
            if name == SMALL:
                self.time_small(dtype, with_compiled)
            elif name in self.kernels and dtype in self.kernels[name].dtypes:
                self.time(name, dtype, MAIN_DIM if INTERPRETED else dim, GOAL_ROWS[dim], 9, with_compiled)

    def table(self) -> None:
        """Measure every kernel, dtype and dimension that was not measured for a goal, as long as there is time."""
        for name, kernel in self.kernels.items():
            for dim in DIMS:
                for dtype in kernel.dtypes:
                    with_compiled = name in COMPILED_KERNELS and dim in COMPILED_DIMS
                    if self.is_measured(name, dtype, dim, with_compiled):
                        continue
                    if self.seconds() > SECONDS - COMPILE_SECONDS:
                        print(f"{name} {dtype} {dim} and what follows: no time left", flush=True)
                        return
                    wanted = TABLE_BYTES // (dim * DTYPES[dtype].itemsize) // 256 * 256
                    self.time(name, dtype, dim, wanted, 5, with_compiled)

    def check(self, name: str, dtype: str, dim: int) -> bool:
        """Return whether the kernel gives what the oracle gives, asking it once."""
        if (name, dtype, dim) not in self.checks:
            count = CHECKED_ROWS if INTERPRETED or not name.startswith("covariance") else 8 * CHECKED_ROWS
            self.note_check(name, dtype, dim, lambda: self.kernels[name].check(awkward_rows(count, dim, DTYPES[dtype])))
        return self.checks[name, dtype, dim]["passed"]

    def note_check(self, name: str, dtype: str, dim: int, check: Callable[[], float]) -> None:
        """Keep what a check finds: its error over what is allowed."""
        reason = ""
        try:
            error = check()
        except Exception as failure:  # a kernel that this GPU does not take must not hide the others
            error, reason = math.nan, one_line(failure)
        self.checks[name, dtype, dim] = {
            "kernel": name,
            "dtype": dtype,
            "dim": dim,
            "error": known(error),
            "passed": error <= 1,
            "reason": reason,
        }
        if not error <= 1:
            print(f"WRONG: {name} {dtype} {dim}, {error:.3g} times the error that is allowed {reason}", flush=True)

    def time(self, name: str, dtype: str, dim: int, wanted: int, rounds: int, with_compiled: bool) -> None:
        """Time a kernel beside its peers, if it is right, the last of so many rows too."""
        if not self.check(name, dtype, dim):
            return
        try:
            count = rows_that_fit(wanted, self.kernels[name], dim, DTYPES[dtype])
            x = plain_rows(count, dim, DTYPES[dtype])
            case = self.kernels[name].case(x, with_compiled and not INTERPRETED)
            if case.last_rows_error:
                case.run()
                self.note_check(name, dtype, dim, case.last_rows_error)
            if self.check(name, dtype, dim):
                runs = {"ours": warm(case.run), **usable(case.peers, warm, f"{name} {dtype} {dim}")}
                self.note(name, dtype, x, case, measure(runs, rounds))
        except torch.OutOfMemoryError as error:
            print(f"{name} {dtype} {dim}: not measured, {one_line(error)}", flush=True)

    def time_small(self, dtype: str, with_compiled: bool) -> None:
        """Time a batch so small that launches bound it, as part of a CUDA graph."""
        if not self.check("row transform", dtype, SMALL_DIM):
            return
        x = plain_rows(SMALL_ROWS, SMALL_DIM, DTYPES[dtype])
        case = row_transform(x, with_compiled and not INTERPRETED)
        graphs = {"ours": in_graph(case.run), **usable(case.peers, in_graph, f"{SMALL} {dtype}")}
        times = measure(graphs, 9)
        self.note(SMALL, dtype, x, case, {peer: [s / GRAPH_CALLS for s in seconds] for peer, seconds in times.items()})

    def note(self, name: str, dtype: str, x: torch.Tensor, case: Case, times: dict[str, list[float]]) -> None:
        """Keep a row for each comparison, and print them in one line."""
        num_rows, dim = x.shape
        ours, spread = median_and_spread(times.pop("ours"))
        peers = {peer: median_and_spread(seconds)[0] for peer, seconds in times.items()}
        peers |= self.fixed_peers(name, dtype, dim, case)
        speed = case.amount / ours / (1e9 if case.unit == "GB/s" else 1e12)
        what = f"{name} {dtype}, {num_rows:,} x {dim}"
        for peer, seconds in peers.items():
            goal = GOALS.get((name, dtype, dim, peer))
            line = row(what, known(speed), peer, known(seconds / ours), goal, known(spread), case.unit)
            line |= {"kernel": name, "dtype": dtype, "dim": dim, "num_rows": num_rows, "median_us": known(ours * 1e6)}
            self.rows.append(line | {"bytes" if case.unit == "GB/s" else "operations": case.amount})
        ratios = ", ".join(f"{seconds / ours:.2f}x {peer}" for peer, seconds in peers.items())
        print(f"{what:58} {ours * 1e6:9.1f} us {speed:7.1f} {case.unit:7} +-{spread:4.1%}  {ratios}", flush=True)

    def fixed_peers(self, name: str, dtype: str, dim: int, case: Case) -> dict[str, float]:
        """Return the seconds of peers that need no run: the limit of this GPU, and goals in themselves."""
        if name in FIXED_SECONDS:
            return dict([FIXED_SECONDS[name]])
        peers = {case.limit: case.amount / self.limits[case.limit]}
        if (name, dtype, dim) in FIXED_RATES:
            peer, rate = FIXED_RATES[name, dtype, dim]
            peers[peer] = case.amount / rate
        return peers

    def is_measured(self, name: str, dtype: str, dim: int, with_compiled: bool) -> bool:
        """Return whether there are figures already, torch.compile's among them where wanted."""
        lines = [line for line in self.rows if (line["kernel"], line["dtype"], line["dim"]) == (name, dtype, dim)]
        return bool(lines) and (not with_compiled or any(line["peer"] == "torch.compile" for line in lines))

    def judged(self) -> list[dict[str, Any]]:
        """Return each goal and what was measured of it, the last figure if there are several."""
        found = {(line["kernel"], line["dtype"], line["dim"], line["peer"]): line["ratio"] for line in self.rows}
        lines = []
        for key, goal in GOALS.items():
            ratio = found.get(key)
            verdict = "not measured" if ratio is None else "met" if ratio >= goal else "missed"
            line = dict(zip(("kernel", "dtype", "dim", "peer"), key, strict=True))
            lines.append(line | {"goal": goal, "ratio": ratio, "verdict": verdict})
        return lines

    def show_verdict(self) -> None:
        """Print each goal, met or not."""
        print(f"\nverdict after {self.seconds():.0f} s, on the goals for an H200:")
        for line in self.judged():
            measured = "" if line["ratio"] is None else f"{line['ratio']:.2f}x, "
            what = f"{line['kernel']} {line['dtype']} {line['dim']}"
            print(f"{line['verdict']:12} {what}: {measured}goal {line['goal']}x {line['peer']}")
        wrong = [check for check in self.checks.values() if not check["passed"]]
        print(f"{len(wrong)} of {len(self.checks)} checks failed")
        if INTERPRETED:
            print("Triton's interpreter: the checks count, the figures mean nothing")
        print(flush=True)

    def write(self, json_path: Path | None, csv_path: Path | None, on: dict[str, Any]) -> None:
        """Write what was found, on the machine `on`."""
        limits_found = {name: known(value) for name, value in self.limits.items()}
        settings = {"interpreted": INTERPRETED, "seconds": round(self.seconds(), 1), "limits": limits_found}
        if json_path:
            checks = list(self.checks.values())
            write_json(json_path, machine=on, settings=settings, checks=checks, goals=self.judged(), rows=self.rows)
        if csv_path:
            names = dict.fromkeys(name for line in self.rows for name in line)
            with csv_path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(names))
                writer.writeheader()
                writer.writerows(self.rows)


def rows_that_fit(wanted: int, kernel: Kernel, dim: int, dtype: torch.dtype) -> int:
    if INTERPRETED:
        return CHECKED_ROWS
    fitting = free_bytes() // (kernel.num_tensors * dim * dtype.itemsize)
    return min(wanted, fitting // 256 * 256)


def usable(
    peers: dict[str, Callable[[], object]], prepare: Callable[[Callable[[], object]], Callable[[], object]], what: str
) -> dict[str, Callable[[], object]]:
    """Return the peers, prepared; leave out those that do not run here, and say so."""
    found = {}
    for name, run in peers.items():
        try:
            found[name] = prepare(run)
        except Exception as error:  # whatever their compiler or their allocator may raise
            print(f"{what}: no {name}, {one_line(error)}", flush=True)
    return found


def public_check(extension: Extension) -> Callable[[], float] | None:
    """Return a check of `fit` and `transform` on the GPU against the CPU; None, and say so, if they do not import."""
    if reason := extension.wait():
        print(f"no extension, so `fit` and `transform` are not checked: {reason}", flush=True)
        return None
    try:
        from realign_fast import fit
    except ImportError as error:
        print(f"`fit` and `transform` are not checked: {one_line(error)}", flush=True)
        return None

    def check() -> float:
        text, image = plain_rows(300, 70, torch.float32), plain_rows(300, 70, torch.float32) - 0.1
        on_cpu = fit(text.cpu(), image.cpu()).transform(text.cpu())
        on_gpu = fit(text, image, backend="triton").transform(text, backend="triton")
        return float((on_gpu.cpu() - on_cpu).abs().max() / 1e-6)

    return check


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verdict", action="store_true", help="the first part alone")
    parser.add_argument("--json", type=Path, help="where the result goes; default: bench/results/gpu-<name of it>.json")
    parser.add_argument("--csv", type=Path, help="the same for a table with a row a figure")
    options = parser.parse_args()
    if not INTERPRETED and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; with TRITON_INTERPRET=1 this runs on the CPU, on small shapes")
    found = machine()
    print(*found.values(), sep=", ", flush=True)
    paths = [options.json, options.csv]
    if not INTERPRETED:
        results = ROOT / "bench" / "results"
        results.mkdir(exist_ok=True)
        slug = re.sub("[^a-z0-9]+", "-", found["gpu"].lower()).strip("-")
        paths = [path or results / f"gpu-{slug}{suffix}" for path, suffix in zip(paths, (".json", ".csv"), strict=True)]
    bench, extension = Bench(), Extension()
    try:
        bench.verdict()
        if check := public_check(extension):
            bench.note_check("fit and transform", "float32", 70, check)
        bench.show_verdict()
        if not options.verdict:
            bench.table()
            bench.show_verdict()
    finally:
        bench.write(*paths, found)
    sys.exit(0 if all(check["passed"] for check in bench.checks.values()) else 1)


if __name__ == "__main__":
    main()
