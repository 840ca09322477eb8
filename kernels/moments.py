"""Fixed-point sums of unit rows: integers, so that every run and every grid give the same bits, atomics or not.

Source: the moments of ReAlign (arXiv 2602.07026); the fixed point is ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._rows import count_bad, inverse_norm, is_plain, new_bad_rows, on_device, square64, to_fixed
from ._tuning import MAX_BLOCK_D, Plan, compile_options, plan_rows
from .row_transform import SMALLEST_FUSED_DIM, Maps, map_rows, map_rows_long, row_transform

# Sums count in units of 2**-27: eight rows fit in an int32.
FIXED_POINT_BITS = 27
_MAX_BLOCK_N = 8
_UNITS = tl.constexpr(float(1 << FIXED_POINT_BITS))


@triton.jit
def _column_odds(cols):
    """Return an odd number of 32 bits for each column, to weigh its bits in the key of a row."""
    mixed = (cols + 1) * -1640531527
    return (mixed ^ (mixed >> 15)) | 1


@triton.jit
def _key_part(x, odds):
    """Return a sum over some columns (BLOCK_N, 1) that says what the rows hold, whatever the order of the columns."""
    bits = x.to(tl.int32 if x.dtype == tl.float32 else tl.int16, bitcast=True)
    return tl.sum(bits.to(tl.int64) * odds.to(tl.int64), axis=1, keep_dims=True)


@triton.jit
def _store_keys(key_rows, key, good, row_mask):
    """Store a hash of each row's content, at least 1; and 0 for bad rows."""
    key = key.to(tl.uint64)
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = (key ^ (key >> 31)).to(tl.int64)
    tl.store(key_rows, tl.where(good, tl.where(key == 0, 1, key), 0), mask=row_mask)


@triton.jit(do_not_specialize=["first_row"])
def _moments_kernel(
    x_ptr, sums_ptr, keys_ptr, scale_ptr, shift_ptr, correction_ptr, scale64_ptr, shift64_ptr, correction64_ptr,
    bad_ptr, num_rows, dim, stride_xn, first_row,
    HAS_KEYS: tl.constexpr, MAPPED: tl.constexpr, FUSED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)[None, :]
    if MAPPED:
        scale = tl.load(scale_ptr)
        shift = tl.load(shift_ptr + cols, mask=cols < dim, other=0)
        correction = tl.load(correction_ptr + cols, mask=cols < dim, other=0)
    if HAS_KEYS:
        odds = _column_odds(cols)
    sums = tl.zeros([1, BLOCK_D], tl.int64)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0)):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        row_mask = rows < num_rows
        x_rows = x_ptr + rows * stride_xn
        loaded = tl.load(x_rows + cols, mask=row_mask & (cols < dim), other=0)
        x = loaded.to(tl.float32)
        if HAS_KEYS:
            key = _key_part(loaded, odds)
        if MAPPED:
            unit, plain = map_rows(x, scale, shift, correction, FUSED)
        else:
            square = tl.sum(x * x, axis=1, keep_dims=True)
            plain = is_plain(square)
            unit = x * inverse_norm(tl.where(plain, square, 0))
        fixed = to_fixed(tl.where(plain & row_mask, unit * _UNITS, 0)).to(tl.int32)
        sums += tl.sum(fixed, axis=0, keep_dims=True).to(tl.int64)
        good = plain
        wanted = row_mask & (plain == 0)
        if tl.max(wanted.to(tl.int32)) > 0:
            if MAPPED:
                map_rows_long(
                    x_rows, sums_ptr, wanted, tl.zeros([BLOCK_N, 1], tl.int64), scale64_ptr, shift64_ptr,
                    correction64_ptr, bad_ptr, first_row + rows, dim, True, _UNITS, BLOCK_N, CHUNK_D,
                )  # fmt: skip
            else:
                good = good | _add_long(x_rows, wanted, sums_ptr, bad_ptr, first_row + rows, dim, BLOCK_N, CHUNK_D)
        if HAS_KEYS:
            _store_keys(keys_ptr + rows, key, good, row_mask)
    tl.atomic_add(sums_ptr + cols, sums, mask=cols < dim)


@triton.jit
def _add_long(x_rows, wanted, sums_ptr, bad_ptr, rows, dim, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr):
    """Add the `wanted` rows in float64, whatever their magnitude; count the bad ones, return which are good."""
    square = square64(x_rows, wanted, dim, BLOCK_N, CHUNK_D)
    good = count_bad(square, wanted, bad_ptr, rows)
    factor = _UNITS * inverse_norm(tl.where(good, square, 0))
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        x = tl.load(x_rows + cols, mask=good & (cols < dim), other=0).to(tl.float64)
        sums = tl.sum(to_fixed(x * factor).to(tl.int64), axis=0, keep_dims=True)
        tl.atomic_add(sums_ptr + cols, sums, mask=cols < dim)
    return good


@triton.jit(do_not_specialize=["first_row"])
def _factors_kernel(
    x_ptr, factor_ptr, keys_ptr, bad_ptr, num_rows, dim, stride_xn, first_row,
    HAS_KEYS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """First sweep over rows that do not fit in registers: by what each must be multiplied, 0 for bad ones."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
    row_mask = rows < num_rows
    x_rows = x_ptr + rows * stride_xn
    square = square64(x_rows, row_mask, dim, BLOCK_N, CHUNK_D)
    good = count_bad(square, row_mask, bad_ptr, first_row + rows)
    tl.store(factor_ptr + rows, tl.where(good, _UNITS * inverse_norm(tl.where(good, square, 0)), 0), mask=row_mask)
    if HAS_KEYS:
        key = tl.zeros([BLOCK_N, 1], tl.int64)
        for start in range(0, dim, CHUNK_D):
            cols = start + tl.arange(0, CHUNK_D)[None, :]
            x = tl.load(x_rows + cols, mask=row_mask & (cols < dim), other=0)
            key += _key_part(x, _column_odds(cols))
        _store_keys(keys_ptr + rows, key, good, row_mask)


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
        sums += tl.sum(to_fixed(x * factor).to(tl.int64), axis=0, keep_dims=True)
    tl.atomic_add(sums_ptr + cols, sums, mask=cols < dim)


def plan_moments(num_rows: int, dim: int, device: torch.device) -> Plan:
    """Return the launch: sums of 64 bits need more registers than rows, so more warps share them."""
    return plan_rows(num_rows, dim, device, max_block_n=_MAX_BLOCK_N, elements_per_warp=512)


def moments(
    x: torch.Tensor, sums: torch.Tensor, bad_rows: torch.Tensor, first_row: int = 0, keys: torch.Tensor | None = None
) -> None:
    """Add each good row, normalised, to `sums` in units of 2**-27; nothing waits for the device.

    Parameters
    ----------
    x
        `(n, dim)`, float16, bfloat16 or float32, last axis contiguous.
    sums
        `(dim,)` int64, added to.
    bad_rows
        `_rows.new_bad_rows`, added to.
    first_row
        The number of `x[0]` in the whole, of which the first bad row is one.
    keys
        `(n,)` int64: receives a hash of each row's content, and 0 for bad rows.
    """
    num_rows, dim = x.shape
    if num_rows == 0:
        return
    plan = plan_moments(num_rows, dim, x.device)
    if dim <= MAX_BLOCK_D:
        _sum_rows(x, sums, None, bad_rows, first_row, keys, plan)
        return
    factors = torch.empty(num_rows, dtype=torch.float64, device=x.device)
    with on_device(x.device):
        _factors_kernel[(triton.cdiv(num_rows, _MAX_BLOCK_N),)](
            x, factors, keys, bad_rows, num_rows, dim, x.stride(0), first_row, HAS_KEYS=keys is not None,
            BLOCK_N=_MAX_BLOCK_N, CHUNK_D=plan.chunk_d, **compile_options(plan.num_warps),
        )  # fmt: skip
        _columns_kernel[(plan.num_programs, triton.cdiv(dim, plan.chunk_d))](
            x, factors, sums, num_rows, dim, x.stride(0),
            BLOCK_N=_MAX_BLOCK_N, BLOCK_D=plan.chunk_d, **compile_options(plan.num_warps),
        )  # fmt: skip


def transformed_moments(
    x: torch.Tensor, maps: Maps, sums: torch.Tensor, bad_rows: torch.Tensor, first_row: int = 0
) -> None:
    """Add what the first map makes of each good row, as `moments` does, without writing it anywhere."""
    num_rows, dim = x.shape
    if num_rows == 0:
        return
    if dim <= MAX_BLOCK_D // 2:  # beyond, map and sums leave a row too few registers
        _sum_rows(x, sums, maps, bad_rows, first_row, None, plan_moments(num_rows, dim, x.device))
        return
    mapped = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    row_transform(x, mapped, maps, bad_rows)
    moments(mapped, sums, new_bad_rows(x.device))  # bad rows are zeros there, and counted already


def _sum_rows(
    x: torch.Tensor,
    sums: torch.Tensor,
    maps: Maps | None,
    bad_rows: torch.Tensor,
    first_row: int,
    keys: torch.Tensor | None,
    plan: Plan,
) -> None:
    num_rows, dim = x.shape
    with on_device(x.device):
        _moments_kernel[(plan.num_programs,)](
            x, sums, keys, *(maps or [None] * len(Maps._fields)), bad_rows, num_rows, dim, x.stride(0), first_row,
            HAS_KEYS=keys is not None, MAPPED=maps is not None, FUSED=dim >= SMALLEST_FUSED_DIM,
            BLOCK_N=plan.block_n, BLOCK_D=plan.block_d, CHUNK_D=plan.chunk_d,
            **compile_options(plan.num_warps),
        )  # fmt: skip
