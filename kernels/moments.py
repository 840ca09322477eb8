"""Fixed-point sums of unit rows: integers, so that every run and every grid give the same bits, atomics or not.

Source: the moments of ReAlign (arXiv 2602.07026); the fixed point is ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._tuning import MAX_BLOCK_D, Plan, plan_rows
from .row_transform import _LARGEST_SQUARE, _SMALLEST_SQUARE, _inverse_norm, _square64

# Sums count in units of 2**-27: eight rows fit in an int32.
FIXED_POINT_BITS = 27
_MAX_BLOCK_N = 8
_UNITS = tl.constexpr(float(1 << FIXED_POINT_BITS))


@triton.jit
def _to_fixed(x):
    return tl.floor(x + 0.5)


@triton.jit
def _moments_kernel(
    x_ptr, sums_ptr, bad_ptr, num_rows, dim, stride_xn,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)[None, :]
    sums = tl.zeros([1, BLOCK_D], tl.int64)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0)):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        row_mask = rows < num_rows
        x_rows = x_ptr + rows * stride_xn
        x = tl.load(x_rows + cols, mask=row_mask & (cols < dim), other=0).to(tl.float32)
        square = tl.sum(x * x, axis=1, keep_dims=True)
        plain = (square > _SMALLEST_SQUARE) & (square < _LARGEST_SQUARE)
        unit = tl.where(plain, x * (_UNITS * _inverse_norm(tl.where(plain, square, 0))), 0)
        sums += tl.sum(_to_fixed(unit).to(tl.int32), axis=0, keep_dims=True).to(tl.int64)
        wanted = row_mask & (plain == 0)
        if tl.max(wanted.to(tl.int32)) > 0:
            _add_long(x_rows, wanted, sums_ptr, bad_ptr, rows, dim, BLOCK_N, CHUNK_D)
    tl.atomic_add(sums_ptr + cols, sums, mask=cols < dim)


@triton.jit
def _add_long(
    x_rows, wanted, sums_ptr, bad_ptr, rows, dim, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr
):  # fmt: skip
    """Add the `wanted` rows in float64, whatever their magnitude; count the bad ones."""
    square = _square64(x_rows, wanted, bad_ptr, rows, dim, BLOCK_N, CHUNK_D)
    good = square > 0
    factor = _UNITS * _inverse_norm(square)
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        x = tl.load(x_rows + cols, mask=good & (cols < dim), other=0).to(tl.float64)
        sums = tl.sum(_to_fixed(x * factor).to(tl.int64), axis=0, keep_dims=True)
        tl.atomic_add(sums_ptr + cols, sums, mask=cols < dim)


@triton.jit
def _factors_kernel(
    x_ptr, factor_ptr, bad_ptr, num_rows, dim, stride_xn, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr
):  # fmt: skip
    """First sweep over rows that do not fit in registers: by what each must be multiplied, 0 for bad ones."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
    row_mask = rows < num_rows
    square = _square64(x_ptr + rows * stride_xn, row_mask, bad_ptr, rows, dim, BLOCK_N, CHUNK_D)
    tl.store(factor_ptr + rows, tl.where(square > 0, _UNITS * _inverse_norm(square), 0), mask=row_mask)


@triton.jit
def _columns_kernel(
    x_ptr, factor_ptr, sums_ptr, num_rows, dim, stride_xn, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Second sweep: every program adds up some columns of every so many rows."""
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    sums = tl.zeros([1, BLOCK_D], tl.int64)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0)):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        factor = tl.load(factor_ptr + rows, mask=rows < num_rows, other=0)
        mask = (rows < num_rows) & (cols < dim) & (factor != 0)
        x = tl.load(x_ptr + rows * stride_xn + cols, mask=mask, other=0).to(tl.float64)
        sums += tl.sum(_to_fixed(x * factor).to(tl.int64), axis=0, keep_dims=True)
    tl.atomic_add(sums_ptr + cols, sums, mask=cols < dim)


def plan_moments(num_rows: int, dim: int, device: torch.device) -> Plan:
    """Return the launch: sums of 64 bits need more registers than rows, so more warps share them."""
    return plan_rows(num_rows, dim, device, max_block_n=_MAX_BLOCK_N, elements_per_warp=512)


def moments(x: torch.Tensor, sums: torch.Tensor, bad_rows: torch.Tensor) -> None:
    """Add each good row, normalised, to `sums` in units of 2**-27; nothing waits for the device.

    Parameters
    ----------
    x
        `(n, dim)`, float16, bfloat16 or float32, last axis contiguous.
    sums
        `(dim,)` int64, added to.
    bad_rows
        `row_transform.new_bad_rows`, added to.
    """
    num_rows, dim = x.shape
    if num_rows == 0:
        return
    plan = plan_moments(num_rows, dim, x.device)
    if dim <= MAX_BLOCK_D:
        _moments_kernel[(plan.num_programs,)](
            x, sums, bad_rows, num_rows, dim, x.stride(0),
            BLOCK_N=plan.block_n, BLOCK_D=plan.block_d, CHUNK_D=plan.chunk_d,
            num_warps=plan.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
        return
    factors = torch.empty(num_rows, dtype=torch.float64, device=x.device)
    _factors_kernel[(triton.cdiv(num_rows, _MAX_BLOCK_N),)](
        x, factors, bad_rows, num_rows, dim, x.stride(0),
        BLOCK_N=_MAX_BLOCK_N, CHUNK_D=plan.chunk_d, num_warps=plan.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    _columns_kernel[(plan.num_programs, triton.cdiv(dim, plan.chunk_d))](
        x, factors, sums, num_rows, dim, x.stride(0),
        BLOCK_N=_MAX_BLOCK_N, BLOCK_D=plan.chunk_d, num_warps=plan.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
