"""A matrix applied to centred unit rows, `W (pi(x) - mean)`: one matrix product of the raw rows, nothing beside it.

A row's norm is gathered from the tiles of the row on their way to the tensor cores: each program sees whole rows. It
divides the product afterwards, and the mean is an offset of the result.

Source: the full-covariance maps beside ReAlign (whitening, CORAL, optimal transport).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._rows import count_bad, inverse_norm, is_good, is_plain, on_device, square64
from ._tiles import Tile, dot_precision, halves, plan_tile
from ._tuning import ON_HIP, compile_options

# Tiles of so many rows are taken together, all their columns: they and the weights are then read from the cache.
_GROUP = tl.constexpr(8)
# Columns of a tile that are stored at a time.
_STORED_COLUMNS = tl.constexpr(128)
# Rare rows are multiplied in float64, so many columns and terms at a time.
_LONG_COLUMNS = tl.constexpr(16)
_LONG_TERMS = tl.constexpr(64)


class Weights(NamedTuple):
    """`W (u - mean)` as `(scale weight) u - offset`, on one device.

    Attributes
    ----------
    weight : torch.Tensor
        `(dim_out, dim)`, contiguous, in the dtype of the products.
    scale : float
        A power of two, so that the largest element of `weight` lies in [1/2, 1]: float16 holds it, whatever W.
    offset : torch.Tensor
        `(dim_out,)` float32.
    """

    weight: torch.Tensor
    scale: float
    offset: torch.Tensor

    @classmethod
    def of(cls, matrix: torch.Tensor, mean: torch.Tensor, dtype: torch.dtype, precision: str = "high") -> Weights:
        """Return float64 `W` `(dim_out, dim)` and `mean` `(dim,)` for rows of that dtype.

        The offset comes from the rounded weights: their error is then multiplied by the centred row, not by the mean,
        which may be many times as long, and leaves no constant shift behind.
        """
        scale = math.ldexp(1, math.frexp(matrix.abs().max().item())[1])
        weight = (matrix / scale).to(product_dtype(dtype, precision)).contiguous()
        return cls(weight, scale, (scale * (weight.double() @ mean)).float())


def product_dtype(dtype: torch.dtype, precision: str) -> torch.dtype:
    """Return the dtype in which rows of that dtype are multiplied."""
    return torch.bfloat16 if dtype == torch.float32 and precision == "fast" else dtype


@triton.jit
def _whiten_rows_long(
    x_ptr, weight_ptr, offset_ptr, out_ptr, bad_ptr, scale, wanted, first_row, first_col, dim, dim_out,
    stride_xn, stride_on, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute a tile's `wanted` rows in float64, one by one, whatever their magnitude; bad ones become zeros.

    The programs of the first columns count the bad ones.
    """
    left = tl.where(wanted, tl.arange(0, BLOCK_M)[:, None], BLOCK_M)
    for _ in range(tl.sum(wanted.to(tl.int32))):
        i = tl.min(left)
        left = tl.where(left == i, BLOCK_M, left)
        row = first_row + i + tl.zeros([1, 1], tl.int64)
        x_row = x_ptr + row * stride_xn
        square = square64(x_row, row >= 0, dim, 1, _LONG_TERMS)
        good = is_good(square)
        if first_col == 0:
            count_bad(square, row >= 0, bad_ptr, row)
        factor = scale * inverse_norm(tl.where(good, square, 0))
        num_terms = tl.max(tl.where(good, dim, 0))
        for start in range(0, BLOCK_N, _LONG_COLUMNS):
            cols = first_col + start + tl.arange(0, _LONG_COLUMNS)[:, None]
            col_mask = cols < dim_out
            total = tl.zeros([_LONG_COLUMNS, _LONG_TERMS], tl.float64)
            for k in range(0, num_terms, _LONG_TERMS):
                terms = k + tl.arange(0, _LONG_TERMS)[None, :]
                x = tl.load(x_row + terms, mask=terms < dim, other=0).to(tl.float64)
                weight_ptrs = weight_ptr + cols.to(tl.int64) * dim + terms
                total += x * tl.load(weight_ptrs, mask=col_mask & (terms < dim), other=0).to(tl.float64)
            out = tl.sum(total, axis=1, keep_dims=True) * factor - tl.load(offset_ptr + cols, mask=col_mask, other=0)
            # By way of float32: the interpreter cannot round float64 to bfloat16.
            out = tl.where(good, out, 0).to(tl.float32).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * stride_on + cols, out, mask=col_mask)


@triton.jit
def _store_tile(total, factor, offset_ptr, out_rows, row_mask, first_col, dim_out, BLOCK_N: tl.constexpr):
    """Store a tile as rows, some columns at a time: registers hold no more beside it."""
    if BLOCK_N > _STORED_COLUMNS:
        left, right = halves(total)
        _store_tile(left, factor, offset_ptr, out_rows, row_mask, first_col, dim_out, BLOCK_N // 2)
        _store_tile(right, factor, offset_ptr, out_rows, row_mask, first_col + BLOCK_N // 2, dim_out, BLOCK_N // 2)
    else:
        cols = first_col + tl.arange(0, BLOCK_N)[None, :]
        out = total * factor - tl.load(offset_ptr + cols, mask=cols < dim_out, other=0)
        tl.store(out_rows + cols, out.to(out_rows.dtype.element_ty), mask=row_mask & (cols < dim_out))


@triton.jit
def _whiten_kernel(
    x_ptr, weight_ptr, offset_ptr, out_ptr, bad_ptr, scale, num_rows, dim, dim_out, stride_xn, stride_on,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_tiles_m, num_tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(dim_out, BLOCK_N)
    group, rest = tl.program_id(0) // (_GROUP * num_tiles_n), tl.program_id(0) % (_GROUP * num_tiles_n)
    height = tl.minimum(num_tiles_m - group * _GROUP, _GROUP)
    first_row = (group * _GROUP + rest % height).to(tl.int64) * BLOCK_M
    first_col = rest // height * BLOCK_N

    # What lies outside is read from the last row and column, and not stored.
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    cols = first_col + tl.arange(0, BLOCK_N)[None, :]
    terms = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(rows, num_rows - 1) * stride_xn + terms[None, :]
    weight_ptrs = weight_ptr + tl.minimum(cols, dim_out - 1).to(tl.int64) * dim + terms[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_M, 1], tl.float32)
    for start in range(0, dim, BLOCK_K):
        x = tl.load(x_ptrs + start, mask=terms[None, :] < dim - start, other=0)
        weight = tl.load(weight_ptrs + start, mask=terms[:, None] < dim - start, other=0)
        x32 = x.to(tl.float32)
        square += tl.sum(x32 * x32, axis=1, keep_dims=True)
        total = tl.dot(x.to(weight.dtype), weight, total, input_precision=PRECISION)

    plain = is_plain(square)
    factor = scale * inverse_norm(tl.where(plain, square, 0))
    out_rows = out_ptr + rows * stride_on
    _store_tile(total, factor, offset_ptr, out_rows, (rows < num_rows) & plain, first_col, dim_out, BLOCK_N)
    _whiten_rows_long(
        x_ptr, weight_ptr, offset_ptr, out_ptr, bad_ptr, scale, (rows < num_rows) & (plain == 0), first_row, first_col,
        dim, dim_out, stride_xn, stride_on, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def plan_whitening(
    num_rows: int, dim_out: int, device: torch.device, dtype: torch.dtype, precision: str, *, hip: bool = ON_HIP
) -> Tile:
    """Return how a program multiplies for rows of that dtype; there is one for each tile of the result."""
    multiplied = product_dtype(dtype, precision)
    dot = dot_precision(precision, multiplied, hip=hip)
    return plan_tile((num_rows, dim_out), dtype, multiplied, dot, device, hip=hip)


def whiten(
    x: torch.Tensor, weights: Weights, out: torch.Tensor, bad_rows: torch.Tensor, precision: str = "high"
) -> None:
    """Write `W (pi(row) - mean)` of each row; bad rows become zeros and are counted, nothing waits for the device.

    Parameters
    ----------
    x
        `(n, dim)`, float16, bfloat16 or float32, last axis contiguous.
    weights
        Of that dimension, on that device, for that dtype and precision.
    out
        `(n, dim_out)`, float16, bfloat16 or float32, last axis contiguous; shares no memory with `x`.
    bad_rows
        `_rows.new_bad_rows`, added to.
    precision
        Of float32 rows, "exact": float32 products. "high": three TF32 products for each. "fast": products of bfloat16.
        Other rows are multiplied as they are.
    """
    num_rows, dim = x.shape
    dim_out = out.shape[1]
    if num_rows == 0:
        return
    block_m, block_n, block_k, num_warps, num_stages = plan_whitening(num_rows, dim_out, x.device, x.dtype, precision)
    with on_device(x.device):
        _whiten_kernel[(triton.cdiv(num_rows, block_m) * triton.cdiv(dim_out, block_n),)](
            x, weights.weight, weights.offset, out, bad_rows, weights.scale,
            num_rows, dim, dim_out, x.stride(0), out.stride(0),
            PRECISION=dot_precision(precision, weights.weight.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            **compile_options(num_warps, num_stages),
        )  # fmt: skip
