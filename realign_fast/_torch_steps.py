"""Steps of a map on a device, chunk by chunk, through the kernels of a backend: a matrix, two projections, noise."""

from __future__ import annotations

from typing import Any

import torch

from ._steps import Affine, Noise
from ._torch_rows import add_noise
from .methods import ParametersTable

_CHUNK_ELEMENTS = 1 << 24  # bounds what lies between the steps

Bad = tuple[int, int, int]


def staged_transform(
    backend: Any,
    x: torch.Tensor,
    out: torch.Tensor,
    affine: Affine | None,
    table: ParametersTable | None,
    noise: Noise | None,
) -> list[tuple[int, torch.Tensor]]:
    """Write to `out` `(n, out_dim)` what the steps that are given make of each row of `x` `(n, dim)`.

    Returns counts of bad rows, which become zeros, chunk by chunk: the first row of the chunk, and what the
    `read_bad_rows` of the backend reads.
    """
    counts = []
    step = max(1, _CHUNK_ELEMENTS // max(x.shape[1], out.shape[1]))
    for start in range(0, len(x), step):
        rows, target = x[start : start + step], out[start : start + step]
        here = None if noise is None else noise.of_rows(start, len(rows))
        seen = []
        if affine is not None:  # then something lies between the steps
            exact = target.dtype == torch.float64
            moved = torch.empty(target.shape, dtype=torch.float64 if exact else torch.float32, device=x.device)
            seen.append(backend.affine(rows, moved, affine))
            rows = moved
        if table is None:
            target.copy_(rows if here is None else add_noise(rows, here))
        elif here is None:
            seen.append(backend.row_transform(rows, target, table.on(x.device), None))
        else:
            seen.append(backend.noisy_row_transform(rows, target, table.on(x.device), here))
        counts.append((start, seen[0]))  # later steps find zeros where bad rows were
    return counts


def read_bad_rows(backend: Any, counts: list[tuple[int, torch.Tensor]]) -> Bad:
    """Return `(num_zero, num_nonfinite, first_bad)` of all chunks; waits for the device."""
    read = [(start, backend.read_bad_rows(each)) for start, each in counts]
    firsts = [start + first for start, (_, _, first) in read if first >= 0]
    return sum(bad[0] for _, bad in read), sum(bad[1] for _, bad in read), min(firsts, default=-1)
