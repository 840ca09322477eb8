"""Where work runs: one function that chooses, one that counts threads."""

from __future__ import annotations

import os
import sys
from functools import cache

BACKENDS = ("auto", "cpu", "torch")


def choose(requested: str, device: str) -> str:
    """Return "cpu" (the C++ kernels) or "torch" (plain torch) for rows that lie on `device`.

    A choice left open may fall back; a backend asked for by name raises where it cannot run.

    Parameters
    ----------
    requested
        "auto", "cpu" or "torch".
    device
        "cpu" for arrays and CPU tensors, otherwise torch's name of the device type, such as "cuda".

    Raises
    ------
    ValueError
        If `requested` is unknown or cannot run on `device`.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "auto":
        return "cpu" if device == "cpu" else "torch"
    if requested == "cpu" and device != "cpu":
        raise ValueError(f"backend 'cpu' takes rows in host memory, got rows on {device}")
    return requested


def count_threads(num_threads: int | None) -> int:
    """Return how many threads a kernel uses: `num_threads`, or the cores this process might use when first asked.

    Inside a DataLoader worker it is one, since there the workers are the parallelism.

    Raises
    ------
    ValueError
        If `num_threads` is less than 1.
    """
    if num_threads is not None:
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        return num_threads
    worker = sys.modules.get("torch.utils.data._utils.worker")
    if worker is not None and worker.get_worker_info() is not None:
        return 1
    return _count_cores(os.getpid())


@cache  # asking the system takes as long as transforming a few rows
def _count_cores(process: int) -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(process))
    return os.cpu_count() or 1
