"""Steps of a map on a device, chunk by chunk, through the kernels of a backend: a matrix, two projections, noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ._steps import Affine, Noise
from .methods import ParametersTable

_CHUNK_ELEMENTS = 1 << 24  # bounds what lies between the steps
_WORD = 0xFFFFFFFF

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
        moved = target
        if affine is not None or noise is not None:  # then something lies between the steps
            exact = target.dtype == torch.float64
            moved = torch.empty(target.shape, dtype=torch.float64 if exact else torch.float32, device=x.device)
        seen = []
        if affine is not None:
            seen.append(backend.affine(rows, moved, affine))
            rows = moved
        if table is not None:
            mapped = target if noise is None else moved
            seen.append(backend.row_transform(rows, mapped, table.on(x.device), None))
            rows = mapped
        if noise is not None:
            rows = add_noise(rows, noise.of_rows(start, len(rows)))
        if rows is not target:
            target.copy_(rows)
        counts.append((start, seen[0]))  # later steps find zeros where bad rows were
    return counts


def read_bad_rows(backend: Any, counts: list[tuple[int, torch.Tensor]]) -> Bad:
    """Return `(num_zero, num_nonfinite, first_bad)` of all chunks; waits for the device."""
    read = [(start, backend.read_bad_rows(each)) for start, each in counts]
    firsts = [start + first for start, (_, _, first) in read if first >= 0]
    return sum(bad[0] for _, bad in read), sum(bad[1] for _, bad in read), min(firsts, default=-1)


def add_noise(rows: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Return `pi(row + noise)` of `(n, dim)` rows; rows of zeros stay so."""
    numbers = torch.from_numpy(np.ascontiguousarray(noise.numbers(len(rows)))).to(rows.device)
    moved = rows + noise.std * normals(noise.seed, numbers, rows.shape[1]).to(rows.dtype)
    unit: torch.Tensor = moved / torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    return unit.masked_fill_((rows == 0).all(dim=1, keepdim=True), 0)


def normals(seed: int, numbers: torch.Tensor, dim: int) -> torch.Tensor:
    """Return `(n, dim)` float32 Gaussian numbers, as `Noise` says, of rows with these numbers `(n,)` int64."""
    groups = (dim + 3) // 4
    group = torch.arange(groups, device=numbers.device)[None, :]
    low, high = numbers[:, None] & _WORD, numbers[:, None] >> 32 & _WORD
    words = [each.expand(len(numbers), groups) for each in (group, low, high, torch.zeros_like(low))]
    keys = [seed & _WORD, seed >> 32]
    for _ in range(10):
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57  # the low 64 bits, whatever the sign
        words = [
            (b >> 32 & _WORD) ^ words[1] ^ keys[0],
            b & _WORD,
            (a >> 32 & _WORD) ^ words[3] ^ keys[1],
            a & _WORD,
        ]
        keys = [(keys[0] + 0x9E3779B9) & _WORD, (keys[1] + 0xBB67AE85) & _WORD]
    uniform = [((word >> 8).float() + 0.5) * 2.0**-24 for word in words]
    found = []
    for first, second in (uniform[:2], uniform[2:]):
        radius = torch.sqrt(-2 * torch.log(first))
        angle = 2 * math.pi * second
        found += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.cat(found, dim=1)[:, :dim]
