"""What every kernel that normalises rows shares: which rows are plain, the float64 way for the others, their count."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

# Squares of float32 values are exact enough between these, and neither overflow nor vanish.
_SMALLEST_SQUARE = tl.constexpr(1e-28)
_LARGEST_SQUARE = tl.constexpr(1e30)
_LARGEST_FLOAT64 = tl.constexpr(1.7976931348623157e308)
# The first bad row is kept as its distance from here, so that counts of no rows are zeros.
_FAR_ROW = 1 << 62
_FAR_ROW_TL = tl.constexpr(_FAR_ROW)


@triton.jit
def is_plain(square):
    """Whether float32 arithmetic serves rows of these squared norms: neither bad nor of extreme magnitude."""
    return (square > _SMALLEST_SQUARE) & (square < _LARGEST_SQUARE)


@triton.jit
def inverse_norm(square):
    """1 / sqrt(square), or 1 where it is 0: pi(0) = 0."""
    square = tl.where(square == 0, 1.0, square)
    if square.dtype == tl.float32:  # where the plain forms are approximate
        return tl.div_rn(1.0, tl.sqrt_rn(square))
    else:
        return 1 / tl.sqrt(square)


@triton.jit
def square64(x_rows, wanted, dim, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr):
    """Squared norms (BLOCK_N, 1) of the `wanted` rows: 0 or not finite for bad rows alone.

    No square of a float32 overflows or vanishes in float64: the sum alone tells zero and not finite rows.
    """
    square = tl.zeros([BLOCK_N, 1], tl.float64)
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        x = tl.load(x_rows + cols, mask=wanted & (cols < dim), other=0).to(tl.float64)
        square += tl.sum(x * x, axis=1, keep_dims=True)
    return square


@triton.jit
def is_good(square):
    """Whether rows of these float64 squared norms are neither zero nor hold NaN or infinity."""
    return (square > 0) & (square <= _LARGEST_FLOAT64)


@triton.jit
def to_fixed(x):
    """Round to whole numbers."""
    return tl.floor(x + 0.5)


@triton.jit
def count_bad(square, wanted, bad_ptr, rows):
    """Count the bad ones among the `wanted` rows; return which of them are good."""
    good = is_good(square)
    zero, nonfinite = wanted & (square == 0), wanted & (good == 0) & (square != 0)
    # Atomics on integers give the same result in any order.
    tl.atomic_add(bad_ptr + tl.zeros_like(rows), zero.to(tl.int64), mask=zero)
    tl.atomic_add(bad_ptr + 1 + tl.zeros_like(rows), nonfinite.to(tl.int64), mask=nonfinite)
    tl.atomic_max(bad_ptr + 2 + tl.zeros_like(rows), -rows + _FAR_ROW_TL, mask=zero | nonfinite)
    return wanted & good


def new_bad_rows(device: torch.device) -> torch.Tensor:
    """Return counts of no bad rows, `(3,)` int64, for the kernels to add to; `read_bad_rows` reads them."""
    return torch.zeros(3, dtype=torch.int64, device=device)


def read_bad_rows(counts: torch.Tensor) -> tuple[int, int, int]:
    """Return `(num_zero, num_nonfinite, first_bad)`, `first_bad` being -1 where there is none; waits for the device."""
    num_zero, num_nonfinite, first = counts.tolist()
    return num_zero, num_nonfinite, _FAR_ROW - first if first else -1


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched on that device and its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
