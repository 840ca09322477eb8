"""The fused row map `out = pi(pi(s u + c) + b)`, `u = pi(x)`: one read and one write of a row.

Maps come as a table, so that one launch serves rows of many domains.

Source: ReAlign (arXiv 2602.07026), Anchor, Trace and Centroid alignment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._tuning import MAX_BLOCK_D, plan_rows

# Squares of float32 values are exact enough between these, and neither overflow nor vanish.
_SMALLEST_SQUARE = tl.constexpr(1e-28)
_LARGEST_SQUARE = tl.constexpr(1e30)
# For squared norms below this, and for fewer columns, the float32 form loses digits.
_SMALLEST_FUSED_SQUARE = tl.constexpr(0.25)
_SMALLEST_FUSED_DIM = 64
_LARGEST_FLOAT64 = tl.constexpr(1.7976931348623157e308)


class Maps(NamedTuple):
    """`num_maps` maps on one device: `scale` (m,), `shift` and `correction` (m, dim), contiguous.

    In float32, and in float64 for the rows that need it.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    correction: torch.Tensor
    scale64: torch.Tensor
    shift64: torch.Tensor
    correction64: torch.Tensor

    @classmethod
    def of(cls, scale: torch.Tensor, shift: torch.Tensor, correction: torch.Tensor) -> Maps:
        """Return float64 parameters in both precisions."""
        exact = tuple(x.contiguous() for x in (scale, shift, correction))
        return cls(*(x.float() for x in exact), *exact)


@triton.jit
def _inverse_norm(square):
    """1 / sqrt(square), or 1 where it is 0: pi(0) = 0."""
    square = tl.where(square == 0, 1.0, square)
    if square.dtype == tl.float32:  # where the plain forms are approximate
        return tl.div_rn(1.0, tl.sqrt_rn(square))
    else:
        return 1 / tl.sqrt(square)


@triton.jit
def _square64(x_rows, wanted, bad_ptr, rows, dim, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr):
    """Squared norms of the `wanted` rows, 0 for bad ones, which are counted."""
    # No square of a float32 overflows or vanishes in float64: the sum alone tells zero and not finite rows.
    square = tl.zeros([BLOCK_N, 1], tl.float64)
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        x = tl.load(x_rows + cols, mask=wanted & (cols < dim), other=0).to(tl.float64)
        square += tl.sum(x * x, axis=1, keep_dims=True)
    finite = square <= _LARGEST_FLOAT64
    zero, nonfinite = wanted & (square == 0), wanted & (finite == 0)
    # (num_zero, num_nonfinite, first_bad): atomics on integers give the same result in any order.
    tl.atomic_add(bad_ptr + tl.zeros_like(rows), zero.to(tl.int64), mask=zero)
    tl.atomic_add(bad_ptr + 1 + tl.zeros_like(rows), nonfinite.to(tl.int64), mask=nonfinite)
    tl.atomic_min(bad_ptr + 2 + tl.zeros_like(rows), rows, mask=zero | nonfinite)
    return tl.where(finite, square, 0)


@triton.jit
def _transform_long(
    x_rows, out_rows, wanted, maps, scale_ptr, shift_ptr, correction_ptr, bad_ptr, rows, dim,
    BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """Map the `wanted` rows in float64, a chunk at a time, whatever their magnitude; count the bad ones."""
    square = _square64(x_rows, wanted, bad_ptr, rows, dim, BLOCK_N, CHUNK_D)
    good = square > 0
    scale = tl.load(scale_ptr + maps) * _inverse_norm(square)
    square = tl.zeros([BLOCK_N, 1], tl.float64)
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        mask = wanted & good & (cols < dim)
        e = scale * tl.load(x_rows + cols, mask=mask, other=0).to(tl.float64)
        e += tl.load(shift_ptr + maps * dim + cols, mask=mask, other=0)
        square += tl.sum(e * e, axis=1, keep_dims=True)
    inverse1 = _inverse_norm(square)
    square = tl.zeros([BLOCK_N, 1], tl.float64)
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        mask = wanted & good & (cols < dim)
        e = scale * tl.load(x_rows + cols, mask=mask, other=0).to(tl.float64)
        e += tl.load(shift_ptr + maps * dim + cols, mask=mask, other=0)
        e = e * inverse1 + tl.load(correction_ptr + maps * dim + cols, mask=mask, other=0)
        square += tl.sum(e * e, axis=1, keep_dims=True)
    inverse2 = _inverse_norm(square)
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        mask = wanted & good & (cols < dim)
        e = scale * tl.load(x_rows + cols, mask=mask, other=0).to(tl.float64)
        e += tl.load(shift_ptr + maps * dim + cols, mask=mask, other=0)
        e = (e * inverse1 + tl.load(correction_ptr + maps * dim + cols, mask=mask, other=0)) * inverse2
        # By way of float32: the interpreter cannot round float64 to bfloat16.
        tl.store(out_rows + cols, e.to(tl.float32).to(out_rows.dtype.element_ty), mask=wanted & (cols < dim))


@triton.jit
def _row_transform_kernel(
    x_ptr, out_ptr, domain_ptr, scale_ptr, shift_ptr, correction_ptr, scale64_ptr, shift64_ptr, correction64_ptr,
    bad_ptr, num_rows, dim, stride_xn, stride_on,
    HAS_DOMAIN: tl.constexpr, FUSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)[None, :]
    col_mask = cols < dim
    if not HAS_DOMAIN:
        maps = tl.zeros([BLOCK_N, 1], tl.int64)
        scale = tl.load(scale_ptr)
        shift = tl.load(shift_ptr + cols, mask=col_mask, other=0)
        correction = tl.load(correction_ptr + cols, mask=col_mask, other=0)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0)):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        row_mask = rows < num_rows
        mask = row_mask & col_mask
        if HAS_DOMAIN:
            maps = tl.load(domain_ptr + rows, mask=row_mask, other=0).to(tl.int64)
            scale = tl.load(scale_ptr + maps)
            shift = tl.load(shift_ptr + maps * dim + cols, mask=mask, other=0)
            correction = tl.load(correction_ptr + maps * dim + cols, mask=mask, other=0)
        x = tl.load(x_ptr + rows * stride_xn + cols, mask=mask, other=0).to(tl.float32)
        square = tl.sum(x * x, axis=1, keep_dims=True)
        e = x * (scale * _inverse_norm(square)) + shift
        square1 = tl.sum(e * e, axis=1, keep_dims=True)
        e = e * _inverse_norm(square1) + correction
        square2 = tl.sum(e * e, axis=1, keep_dims=True)
        plain = (square > _SMALLEST_SQUARE) & (square < _LARGEST_SQUARE)
        plain = plain & (square1 >= _SMALLEST_FUSED_SQUARE) & (square2 >= _SMALLEST_FUSED_SQUARE)
        if not FUSED:
            plain = square < 0
        out = (e * _inverse_norm(square2)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows * stride_on + cols, out, mask=mask & plain)
        wanted = row_mask & (plain == 0)
        if tl.max(wanted.to(tl.int32)) > 0:
            _transform_long(
                x_ptr + rows * stride_xn, out_ptr + rows * stride_on, wanted, maps, scale64_ptr, shift64_ptr,
                correction64_ptr, bad_ptr, rows, dim, BLOCK_N, CHUNK_D,
            )  # fmt: skip


@triton.jit
def _row_transform_wide_kernel(
    x_ptr, out_ptr, domain_ptr, scale_ptr, shift_ptr, correction_ptr, scale64_ptr, shift64_ptr, correction64_ptr,
    bad_ptr, num_rows, dim, stride_xn, stride_on,
    HAS_DOMAIN: tl.constexpr, FUSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """Rows that do not fit in registers: three dot products in a first sweep, the output in a second."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0)):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        row_mask = rows < num_rows
        maps = tl.zeros([BLOCK_N, 1], tl.int64)
        if HAS_DOMAIN:
            maps = tl.load(domain_ptr + rows, mask=row_mask, other=0).to(tl.int64)
        x_rows, out_rows = x_ptr + rows * stride_xn, out_ptr + rows * stride_on
        x_x = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        x_c = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        x_b = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        c_c = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        c_b = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        b_b = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in range(0, dim, BLOCK_D):
            cols = start + columns
            mask = row_mask & (cols < dim)
            x = tl.load(x_rows + cols, mask=mask, other=0).to(tl.float32)
            shift = tl.load(shift_ptr + maps * dim + cols, mask=mask, other=0)
            correction = tl.load(correction_ptr + maps * dim + cols, mask=mask, other=0)
            x_x += x * x
            x_c += x * shift
            x_b += x * correction
            c_c += shift * shift
            c_b += shift * correction
            b_b += correction * correction
        scale = tl.load(scale_ptr + maps)
        square = tl.sum(x_x, axis=1, keep_dims=True)
        r = _inverse_norm(square)
        u_c = r * tl.sum(x_c, axis=1, keep_dims=True)
        square1 = scale * scale + 2 * scale * u_c + tl.sum(c_c, axis=1, keep_dims=True)
        plain = (square > _SMALLEST_SQUARE) & (square < _LARGEST_SQUARE) & (square1 >= _SMALLEST_FUSED_SQUARE)
        inverse1 = _inverse_norm(tl.where(plain, square1, 0))
        v_b = (scale * r * tl.sum(x_b, axis=1, keep_dims=True) + tl.sum(c_b, axis=1, keep_dims=True)) * inverse1
        square2 = 1 + 2 * v_b + tl.sum(b_b, axis=1, keep_dims=True)
        plain = plain & (square2 >= _SMALLEST_FUSED_SQUARE)
        inverse2 = _inverse_norm(tl.where(plain, square2, 0))
        factor = scale * r * inverse1 * inverse2
        for start in range(0, dim, BLOCK_D):
            cols = start + columns
            mask = row_mask & plain & (cols < dim)
            x = tl.load(x_rows + cols, mask=mask, other=0).to(tl.float32)
            shift = tl.load(shift_ptr + maps * dim + cols, mask=mask, other=0)
            correction = tl.load(correction_ptr + maps * dim + cols, mask=mask, other=0)
            out = factor * x + (inverse1 * inverse2) * shift + inverse2 * correction
            tl.store(out_rows + cols, out.to(out_ptr.dtype.element_ty), mask=mask)
        wanted = row_mask & (plain == 0)
        if tl.max(wanted.to(tl.int32)) > 0:
            _transform_long(
                x_rows, out_rows, wanted, maps, scale64_ptr, shift64_ptr, correction64_ptr, bad_ptr, rows, dim,
                BLOCK_N, CHUNK_D,
            )  # fmt: skip


def new_bad_rows(device: torch.device) -> torch.Tensor:
    """Return `(num_zero, num_nonfinite, first_bad)` of no rows, int64; `first_bad` is the largest int64."""
    return torch.tensor([0, 0, torch.iinfo(torch.int64).max], device=device)


def row_transform(
    x: torch.Tensor, out: torch.Tensor, maps: Maps, bad_rows: torch.Tensor, domain: torch.Tensor | None = None
) -> None:
    """Write what its map makes of each row; bad rows become zeros and are counted, nothing waits for the device.

    Parameters
    ----------
    x, out
        `(n, dim)` on one device, float16, bfloat16 or float32, last axis contiguous; may be the same tensor.
    maps
        Of that dimension, on that device.
    bad_rows
        `new_bad_rows`, added to.
    domain
        `(n,)` integers: the number of each row's map. None: all rows have map 0. Not checked here.
    """
    num_rows, dim = x.shape
    if num_rows == 0:
        return
    plan = plan_rows(num_rows, dim, x.device)
    kernel = _row_transform_kernel if dim <= MAX_BLOCK_D else _row_transform_wide_kernel
    kernel[(plan.num_programs,)](
        x, out, x if domain is None else domain, *maps, bad_rows, num_rows, dim, x.stride(0), out.stride(0),
        HAS_DOMAIN=domain is not None, FUSED=dim >= _SMALLEST_FUSED_DIM,
        BLOCK_N=plan.block_n, BLOCK_D=plan.block_d, CHUNK_D=plan.chunk_d,
        num_warps=plan.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
