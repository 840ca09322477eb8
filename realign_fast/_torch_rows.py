"""The row transform and its gradient in plain torch: correct on any device torch knows, fast on none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ._steps import Affine, Noise
from .kernels._maps import Maps

_CHUNK_ELEMENTS = 1 << 24  # bounds the temporaries
_WORD = 0xFFFFFFFF


def tensors_of(table: Iterable[NDArray[np.float64]], device: torch.device) -> Maps:
    """Return scale (m,), shift and correction (m, dim) on a device."""
    exact = [torch.from_numpy(np.ascontiguousarray(x)) for x in table]
    return Maps(*(x.float().to(device) for x in exact), *(to_device(x, device) for x in exact))


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `x` there, or on the CPU where `device` has no such numbers."""
    try:
        return x.to(device)
    except TypeError:
        return x.cpu()


def row_transform(x: torch.Tensor, out: torch.Tensor, maps: Maps, domain: torch.Tensor | None) -> torch.Tensor:
    """Map row `i` of `x` `(n, dim)` by map `domain[i]`, or all by the first, into `out`; bad rows become zeros.

    Returns `(num_zero, num_nonfinite, first_bad)` as a tensor of int64 on the device, `first_bad` being -1 where there
    is none. Computes in float64 where `x` or `out` is float64, else in float32.
    """
    scale, shift, correction = _in_dtype(maps, x.dtype, out.dtype)
    counts = _Counts(x)
    for rows in _chunks(x):
        chunk, _, zero, nonfinite = _finite(x[rows].to(scale.dtype))
        of = slice(0, 1) if domain is None else domain[rows]
        mapped = _project(_project(_project(chunk) * scale[of, None] + shift[of]) + correction[of])
        out[rows] = mapped.masked_fill_(counts.add(rows, zero, nonfinite)[:, None], 0)
    return counts.read()


class _Counts:
    """Bad rows of `x`, counted on its device."""

    def __init__(self, x: torch.Tensor) -> None:
        self._counts = torch.zeros(3, dtype=torch.int64, device=x.device)
        self._num_rows = len(x)
        self._first = torch.full_like(self._counts[2], len(x))

    def add(self, rows: slice, zero: torch.Tensor, nonfinite: torch.Tensor) -> torch.Tensor:
        """Count those of a chunk and return which they are."""
        bad = zero | nonfinite
        self._counts[0] += zero.sum()
        self._counts[1] += nonfinite.sum()
        numbers = torch.arange(rows.start, rows.start + len(bad), device=bad.device)
        self._first = torch.minimum(self._first, torch.where(bad, numbers, self._num_rows).amin())
        return bad

    def read(self) -> torch.Tensor:
        self._counts[2] = torch.where(self._first < self._num_rows, self._first, -1)
        return self._counts


def affine(x: torch.Tensor, out: torch.Tensor, step: Affine) -> torch.Tensor:
    """Write `matrix u + offset` of each row of `x` `(n, dim)`, computed in the dtype of `out`, float32 or float64.

    Bad rows become zeros; returns counts of them as `row_transform`.
    """

    def make(step: Affine) -> tuple[torch.Tensor, ...]:
        parts = step.matrix.T, step.centre, step.centred_offset
        return tuple(torch.tensor(each, dtype=out.dtype, device=x.device) for each in parts)

    matrix, centre, offset = step.on((x.device, out.dtype), make)
    counts = _Counts(x)
    for rows in _chunks(x):
        chunk, _, zero, nonfinite = _finite(x[rows].to(out.dtype))
        mapped = torch.addmm(offset, _project(chunk) - centre, matrix)
        out[rows] = mapped.masked_fill_(counts.add(rows, zero, nonfinite)[:, None], 0)
    return counts.read()


def noisy_row_transform(x: torch.Tensor, out: torch.Tensor, maps: Maps, noise: Noise) -> torch.Tensor:
    """As `row_transform` by the first map, with `noise` before the last projection; bad rows become zeros."""
    exact = torch.float64 in (x.dtype, out.dtype)
    mapped = torch.empty(out.shape, dtype=torch.float64 if exact else torch.float32, device=out.device)
    counts = row_transform(x, mapped, maps, None)
    out.copy_(add_noise(mapped, noise))
    return counts


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


def row_transform_backward(x: torch.Tensor, grad_out: torch.Tensor, grad_x: torch.Tensor, maps: Maps) -> None:
    """Write the gradient with respect to `x`, given that with respect to what the first map makes of it.

    Through each projection `z / ||z||` goes `(g - p (p . g)) / ||z||` with `p = pi(z)`. Bad rows have gradient 0.
    """
    scale, shift, correction = (each[:1] for each in _in_dtype(maps, x.dtype, grad_out.dtype))
    for rows in _chunks(x):
        chunk, largest, zero, nonfinite = _finite(x[rows].to(scale.dtype))
        moved = _project(chunk) * scale + shift
        grad = _back_through(grad_out[rows].to(scale.dtype), _project(moved) + correction)
        grad = _back_through(_back_through(grad, moved) * scale, chunk) / largest
        grad_x[rows] = grad.masked_fill_((zero | nonfinite)[:, None], 0)


def read_bad_rows(counts: torch.Tensor) -> tuple[int, int, int]:
    """Return what `row_transform` counted; waits for the device."""
    num_zero, num_nonfinite, first = counts.tolist()
    return num_zero, num_nonfinite, first


def _in_dtype(maps: Maps, *dtypes: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(maps[3:] if torch.float64 in dtypes else maps[:3])


def _chunks(x: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // x.shape[1])
    return (slice(start, start + step) for start in range(0, len(x), step))


def _finite(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the rows over their largest magnitudes, these, and which rows are zero and not finite; they are zeros.

    So no square overflows.
    """
    largest = rows.abs().amax(dim=1, keepdim=True)
    zero, nonfinite = largest == 0, ~largest.isfinite()
    largest = largest.masked_fill(zero | nonfinite, 1)
    return torch.where(nonfinite, 0, rows / largest), largest, zero[:, 0], nonfinite[:, 0]


def _norms(rows: torch.Tensor) -> torch.Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    safe: torch.Tensor = norms.masked_fill(norms == 0, 1)  # pi(0) = 0
    return safe


def _project(rows: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = rows / _norms(rows)
    return unit


def _back_through(grad: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    norms = _norms(rows)
    unit = rows / norms
    through: torch.Tensor = (grad - unit * (grad * unit).sum(dim=1, keepdim=True)) / norms
    return through
