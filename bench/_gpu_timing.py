"""Time on a GPU by its own events, and what this GPU can do at most: copy, read, multiply matrices.

Under Triton's interpreter the same functions take CPU tensors and run everything once; their figures are NaN.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_LIMIT_BYTES = 1 << 20 if INTERPRETED else 2 << 30
_MATRIX = 64 if INTERPRETED else 8192
GRAPH_CALLS = 1 if INTERPRETED else 50


def free_bytes() -> int:
    """Return how much memory tensors may take, nothing being held back for later ones."""
    if INTERPRETED:
        return 1 << 30
    gc.collect()
    torch.cuda.empty_cache()
    return int(0.85 * torch.cuda.mem_get_info()[0])


def measure(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds a call of each case took in each of `rounds` rounds, after one that is not counted.

    Nothing waits for the GPU before the last round is queued: the time of a launch hides behind the case before.
    """
    if INTERPRETED:
        for run in cases.values():
            run()
        return {name: [math.nan] * rounds for name in cases}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, run in cases.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs[1:]] for name, pairs in events.items()}


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """Return the median, and half the distance of the quartiles over it."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return float(median), float((high - low) / 2 / median)


def warm(run: Callable[[], object]) -> Callable[[], object]:
    """Return `run`, having compiled and allocated what it needs."""
    run()
    return run


def in_graph(run: Callable[[], object]) -> Callable[[], object]:
    """Return what replays GRAPH_CALLS calls of `run` from one CUDA graph."""

    def calls() -> None:
        for _ in range(GRAPH_CALLS):
            run()

    if INTERPRETED:
        return calls
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is captured must have run before, and not on the default stream
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def at_precision(name: str, run: Callable[[], object]) -> Callable[[], object]:
    """Return `run` with float32 matrices multiplied as torch's "highest" (IEEE) or "high" (TF32) says."""

    def call() -> object:
        torch.set_float32_matmul_precision(name)
        return run()

    return call


def limits() -> dict[str, float]:
    """Return bytes/s of copying (read and written) and of reading, and operations/s of matrix products by dtype."""
    return _memory_limits() | _matrix_limits()


def _memory_limits() -> dict[str, float]:
    x = torch.ones(min(_LIMIT_BYTES, free_bytes() // 3) // 4, device=DEVICE)
    y = torch.zeros_like(x)
    times = measure({"copy": lambda: y.copy_(x), "read": lambda: torch.sum(x)}, 10)
    return {"copy": 2 * x.nbytes / min(times["copy"]), "read": x.nbytes / min(times["read"])}


def _matrix_limits() -> dict[str, float]:
    a, b = torch.randn(2, _MATRIX, _MATRIX, device=DEVICE)
    products = {
        "float32": at_precision("highest", partial(torch.matmul, a, b)),
        "TF32": at_precision("high", partial(torch.matmul, a, b)),
    }
    for name in ("bfloat16", "float16"):
        products[name] = partial(torch.matmul, a.to(DTYPES[name]), b.to(DTYPES[name]))
    times = measure(products, 5)
    return {name: 2 * _MATRIX**3 / min(seconds) for name, seconds in times.items()}
