"""Where work runs: one function that chooses, one that counts threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec

_WITH_KERNELS = ("auto", "cpu", "triton")
BACKENDS = (*_WITH_KERNELS, "torch")
# Older GPUs lack bfloat16 arithmetic and asynchronous copies, and Triton no longer tests them.
_LEAST_CAPABILITY = (8, 0)


def choose(requested: str, device: str, dtypes: Collection[str] = ()) -> str:
    """Return "cpu" (the C++ kernels), "triton" (the GPU kernels) or "torch" (plain torch) for rows on `device`.

    A choice left open may fall back; a backend asked for by name raises where it cannot run.

    Parameters
    ----------
    requested
        "auto", "cpu", "triton" or "torch".
    device
        "cpu" for arrays and CPU tensors, otherwise torch's name of the device, such as "cuda:0".
    dtypes
        Of the rows and of the result.

    Raises
    ------
    ValueError
        If `requested` is unknown or cannot run on `device`.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "auto":
        if device == "cpu":
            return "cpu"
        return "torch" if _against_triton(device, dtypes) else "triton"
    if requested == "cpu" and device != "cpu":
        raise ValueError(f"backend 'cpu' takes rows in host memory, got rows on {device}")
    if requested == "triton" and (reason := _against_triton(device, dtypes)):
        raise ValueError(f"backend 'triton' {reason}")
    return requested


def check_has_kernels(requested: str, job: str) -> None:
    """Raise ValueError unless `requested` is "auto", "cpu" or "triton": plain torch does not do this `job`."""
    if requested not in _WITH_KERNELS:
        raise ValueError(f"backend must be one of {', '.join(_WITH_KERNELS)} for {job}, got {requested!r}")


def find_device() -> str:
    """Return torch's name of the GPU that is current, for rows that lie on none.

    Raises
    ------
    ImportError
        If there is no torch.
    ValueError
        If torch finds no GPU.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise ImportError("backend 'triton' needs torch and triton: pip install 'realign-fast[gpu]'") from None
    if _interpreted():
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError("backend 'triton' needs a CUDA or ROCm device, and torch finds none")
    return f"cuda:{torch.cuda.current_device()}"


def _interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU, to test them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _against_triton(device: str, dtypes: Collection[str]) -> str | None:
    """Return why the Triton kernels cannot run there, or None."""
    if find_spec("triton") is None:
        return "needs triton: pip install 'realign-fast[gpu]'"
    if "float64" in dtypes:
        return "takes float16, bfloat16 and float32, got float64"
    if device == "cpu":
        return None if _interpreted() else "takes rows on a GPU, got rows in host memory"
    if not device.startswith("cuda"):
        return f"takes rows on a CUDA or ROCm device, got rows on {device}"
    torch = sys.modules["torch"]
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        least, got = ("{}.{}".format(*pair) for pair in (_LEAST_CAPABILITY, capability))
        return f"needs a GPU of compute capability {least} or newer, {device} has {got}"
    return None


def count_threads(num_threads: int | None) -> int:
    """Return how many threads a kernel uses: `num_threads`, or the cores this process might use when first asked.

    Inside a DataLoader worker it is one, since there the workers are the parallelism, and in a task or an actor of Ray
    as many as it was given.

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
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        context = ray.get_runtime_context()
        if context.worker.mode == ray.WORKER_MODE:
            return max(1, int(context.get_assigned_resources().get("CPU", 1)))
    return _count_cores(os.getpid())


@cache  # asking the system takes as long as transforming a few rows
def _count_cores(process: int) -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(process))
    return os.cpu_count() or 1
