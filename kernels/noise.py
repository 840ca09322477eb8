"""The fused row map with Gaussian noise, `out = pi(map(x) + std z)`: still one read and one write of a row.

Element `j` of `z` is Gaussian number `j // g` of the four that Philox 4x32-10 makes of counter `(j % g, row, row >> 32,
0)`, `g = ceil(dim / 4)`. So a row is four tiles side by side here, one for each number of a counter.

Sources: ReAlign (arXiv 2602.07026), Anchor, Trace and Centroid alignment; Salmon et al., Parallel random numbers: as
easy as 1, 2, 3 (SC 2011); Box and Muller, A note on the generation of random normal deviates (1958).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._maps import Maps
from ._rows import inverse_norm, on_device
from ._tuning import MAX_BLOCK_D, Plan, compile_options, plan_rows
from .row_transform import SMALLEST_FUSED_DIM, is_fused, map_rows_long

# Longer rows do not fit in the registers beside their noise.
MAX_NOISY_D = MAX_BLOCK_D // 2


@triton.jit
def _uniform(word):
    """In (0, 1), of the upper 24 bits."""
    return ((word >> 8).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 16777216)


@triton.jit
def _log(x):
    """Natural logarithm of x in (0, 1): the exponent, and an odd series in (m - 1) / (m + 1) of the mantissa m.

    Not the processor's approximation, which loses all digits beside 1, nor for the angle the library's functions, which
    take memory for angles that do not occur. The C++ kernels compute the same.
    """
    shifted = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # the mantissa then lies in [sqrt(1/2), sqrt(2))
    mantissa = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    t = (mantissa - 1) / (mantissa + 1)
    t2 = t * t
    series = 2 * t + t * t2 * (2.0 / 3 + t2 * (2.0 / 5 + t2 * (2.0 / 7 + t2 * (2.0 / 9))))
    return (shifted >> 23).to(tl.float32) * 0.693147182 + series


@triton.jit
def _box_muller(word1, word2):
    """Two Gaussian numbers of two words."""
    radius, turn = tl.sqrt(-2 * _log(_uniform(word1))), _uniform(word2)
    # The angle in eighths of a turn around the nearest quarter, there by series.
    quarter = (4 * turn + 0.5).to(tl.int32)
    x = (turn - 0.25 * quarter.to(tl.float32)) * 6.28318531
    x2 = x * x
    sine = x + x * x2 * (-1.0 / 6 + x2 * (1.0 / 120 + x2 * (-1.0 / 5040)))
    cosine = 1 + x2 * (-0.5 + x2 * (1.0 / 24 + x2 * (-1.0 / 720 + x2 * (1.0 / 40320))))
    swapped = (quarter & 1) != 0
    c, s = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    z1 = tl.where(((quarter + 1) & 2) != 0, -c, c)
    z2 = tl.where((quarter & 2) != 0, -s, s)
    return radius * z1, radius * z2


@triton.jit
def _load(rows, columns, quarter, dim, mask):
    """Load the four quarters of rows, `quarter` columns each, as float32."""
    x0 = tl.load(rows + columns, mask=mask, other=0).to(tl.float32)
    columns += quarter
    x1 = tl.load(rows + columns, mask=mask & (columns < dim), other=0).to(tl.float32)
    columns += quarter
    x2 = tl.load(rows + columns, mask=mask & (columns < dim), other=0).to(tl.float32)
    columns += quarter
    x3 = tl.load(rows + columns, mask=mask & (columns < dim), other=0).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def _square(x0, x1, x2, x3):
    return tl.sum(x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3, axis=1, keep_dims=True)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first"])
def _noisy_row_transform_kernel(
    x_ptr, out_ptr, number_ptr, scale_ptr, shift_ptr, correction_ptr, scale64_ptr, shift64_ptr, correction64_ptr,
    bad_ptr, scratch_ptr, num_rows, dim, quarter, stride_xn, stride_on, std, seed_low, seed_high, first,
    HAS_NUMBERS: tl.constexpr, FUSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_Q)[None, :]
    column_mask = columns < quarter
    scale = tl.load(scale_ptr)
    c0, c1, c2, c3 = _load(shift_ptr, columns, quarter, dim, column_mask)
    b0, b1, b2, b3 = _load(correction_ptr, columns, quarter, dim, column_mask)
    maps = tl.zeros([BLOCK_N, 1], tl.int64)
    scratch_rows = scratch_ptr + (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)) * dim
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0)):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        row_mask = rows < num_rows
        x_rows = x_ptr + rows * stride_xn
        mask = row_mask & column_mask
        e0, e1, e2, e3 = _load(x_rows, columns, quarter, dim, mask)
        square = _square(e0, e1, e2, e3)
        factor = scale * inverse_norm(square)
        e0, e1, e2, e3 = e0 * factor + c0, e1 * factor + c1, e2 * factor + c2, e3 * factor + c3
        square1 = _square(e0, e1, e2, e3)
        factor = inverse_norm(square1)
        e0, e1, e2, e3 = e0 * factor + b0, e1 * factor + b1, e2 * factor + b2, e3 * factor + b3
        square2 = _square(e0, e1, e2, e3)
        factor = inverse_norm(square2)
        e0, e1, e2, e3 = e0 * factor, e1 * factor, e2 * factor, e3 * factor
        plain = is_fused(square, square1, square2, FUSED)
        wanted = row_mask & (plain == 0)
        if tl.max(wanted.to(tl.int32)) > 0:
            map_rows_long(
                x_rows, scratch_rows, wanted, maps, scale64_ptr, shift64_ptr, correction64_ptr, bad_ptr, rows, dim,
                False, 1, BLOCK_N, CHUNK_D,
            )  # fmt: skip
            tl.debug_barrier()  # what other threads of this program have written is read here
            l0, l1, l2, l3 = _load(scratch_rows, columns, quarter, dim, wanted & column_mask)
            e0, e1 = tl.where(plain, e0, l0), tl.where(plain, e1, l1)
            e2, e3 = tl.where(plain, e2, l2), tl.where(plain, e3, l3)
            tl.debug_barrier()  # before the next tile overwrites it
        good = _square(e0, e1, e2, e3) > 0  # bad rows are zeros, and stay so
        if HAS_NUMBERS:
            number = tl.load(number_ptr + rows, mask=row_mask, other=0).to(tl.uint64)
        else:
            number = (rows + first).to(tl.uint64)
        zero = tl.zeros([BLOCK_N, BLOCK_Q], tl.uint32)
        w0, w1, w2, w3 = tl.philox_impl(
            zero + columns.to(tl.uint32), zero + number.to(tl.uint32), zero + (number >> 32).to(tl.uint32), zero,
            zero + seed_low.to(tl.uint32), zero + seed_high.to(tl.uint32),
        )  # fmt: skip
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
        # What lies beyond the row must not count in its norm.
        noise = tl.where(good & column_mask, std, 0.0)
        e0, e1 = e0 + noise * z0, e1 + tl.where(columns + quarter < dim, noise, 0.0) * z1
        e2 += tl.where(columns + 2 * quarter < dim, noise, 0.0) * z2
        e3 += tl.where(columns + 3 * quarter < dim, noise, 0.0) * z3
        factor = inverse_norm(_square(e0, e1, e2, e3))
        to = out_ptr + rows * stride_on + columns
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        tl.store(to, (e0 * factor).to(dtype), mask=mask)
        tl.store(to + quarter, (e1 * factor).to(dtype), mask=mask & (columns + quarter < dim))
        tl.store(to + 2 * quarter, (e2 * factor).to(dtype), mask=mask & (columns + 2 * quarter < dim))
        tl.store(to + 3 * quarter, (e3 * factor).to(dtype), mask=mask & (columns + 3 * quarter < dim))


def plan_noisy(num_rows: int, dim: int, device: torch.device) -> Plan:
    """Return the launch of `noisy_row_transform`: rows, counters and numbers in registers, so smaller tiles."""
    return plan_rows(num_rows, 4 * triton.cdiv(dim, 4), device, max_block_n=8, elements_per_warp=512)


def noisy_row_transform(
    x: torch.Tensor,
    out: torch.Tensor,
    maps: Maps,
    bad_rows: torch.Tensor,
    std: float,
    seed: int,
    numbers: torch.Tensor | int,
) -> None:
    """Write `pi(map(row) + std z)` of each row; bad rows become zeros and are counted, nothing waits for the device.

    Parameters
    ----------
    x, out
        `(n, dim)` on one device, float16, bfloat16 or float32, last axis contiguous; may be the same tensor. `dim` is
        at most `MAX_NOISY_D`.
    maps
        Of that dimension, on that device; all rows have map 0.
    bad_rows
        `_rows.new_bad_rows`, added to.
    std
        Standard deviation of an element of the noise.
    seed
        Of 64 bits.
    numbers
        `(n,)` int64, the rows' numbers, or that of the first.
    """
    num_rows, dim = x.shape
    if dim > MAX_NOISY_D:
        raise ValueError(f"x must have at most {MAX_NOISY_D} columns, got {dim}")
    if num_rows == 0:
        return
    plan = plan_noisy(num_rows, dim, x.device)
    counted = isinstance(numbers, int)
    # Of the rare rows that are mapped in float64: they must not be rounded to the dtype of `out` before the noise.
    scratch = torch.empty((plan.num_programs * plan.block_n, dim), dtype=torch.float32, device=x.device)
    with on_device(x.device):
        _noisy_row_transform_kernel[(plan.num_programs,)](
            x, out, x if counted else numbers, *maps, bad_rows, scratch, num_rows, dim, triton.cdiv(dim, 4),
            x.stride(0), out.stride(0), std, _signed(seed), _signed(seed >> 32), numbers if counted else 0,
            HAS_NUMBERS=not counted, FUSED=dim >= SMALLEST_FUSED_DIM,
            BLOCK_N=plan.block_n, BLOCK_Q=plan.block_d // 4, CHUNK_D=plan.chunk_d,
            **compile_options(plan.num_warps),
        )  # fmt: skip


def _signed(word: int) -> int:
    """Return the lower 32 bits as a number that always has the type int32 in a kernel."""
    return (word & 0xFFFFFFFF ^ 0x80000000) - 0x80000000
