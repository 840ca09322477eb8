"""Sums of products of centred unit rows: tiles in float32 on tensor cores, added up in float64.

Two kernels take turns on chunks of rows. The first normalises and centres each row once, into a workspace that stays
in the GPU's cache; the second multiplies the workspace with itself. One kernel would do that work once for each tile
of the result that a row is part of, and could not copy its operands straight to where the tensor cores read them.

Source: what the full-covariance maps beside ReAlign (whitening, CORAL, optimal transport) are fitted from. The pilot
keeps digits: without it the mean, squared, would be subtracted from sums that are hardly larger.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._rows import count_bad, inverse_norm, is_plain, on_device, square64
from ._tiles import Tile, dot_precision, halves, plan_tile
from ._tuning import MAX_BLOCK_D, ON_HIP, Plan, compile_options, count_processors, plan_rows, warps_of_chunk

# About half of the cache of an A100, H100 or H200: the rest is for the rows on their way and for the result.
_WORKSPACE_BYTES = 24 << 20
# Rows whose products are added up in float32, at most: more lose digits, fewer make the float64 additions costly.
_FLOAT32_ROWS = 4096
# Of rows that do not fit in registers, a program reads so much at a time: 16 bytes a thread and more.
_WIDE_CHUNK_D = 1024
# Columns of a tile that are added in float64 at a time.
_ADDED_COLUMNS = tl.constexpr(16)


@triton.jit
def _centre_rows_long(
    x_rows, to_rows, wanted, stored, pilot_ptr, bad_ptr, rows, dim, width,
    BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """Store the `wanted` rows, centred in float64, whatever their magnitude; bad and not wanted ones as zeros."""
    square = square64(x_rows, wanted, dim, BLOCK_N, CHUNK_D)
    good = count_bad(square, wanted, bad_ptr, rows)
    factor = inverse_norm(tl.where(good, square, 0))
    for start in range(0, width, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        mask = good & (cols < dim)
        x = tl.load(x_rows + cols, mask=mask, other=0).to(tl.float64)
        centred = x * factor - tl.load(pilot_ptr + cols, mask=cols < dim, other=0)
        # By way of float32: the interpreter cannot round float64 to bfloat16.
        centred = tl.where(mask, centred, 0).to(tl.float32).to(to_rows.dtype.element_ty)
        tl.store(to_rows + cols, centred, mask=stored & (cols < width))


@triton.jit(do_not_specialize=["first_row"])
def _centre_kernel(
    x_ptr, pilot_ptr, centred_ptr, bad_ptr, num_rows, num_stored, dim, width, stride_xn, first_row,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """Write unit rows minus the pilot, `num_stored` rows of `width` elements: zeros around `num_rows` of `dim`."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    pilot = tl.load(pilot_ptr + cols, mask=cols < dim, other=0).to(tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_stored, BLOCK_N), tl.num_programs(0)):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        row_mask = rows < num_rows
        x_rows, to_rows = x_ptr + rows * stride_xn, centred_ptr + rows * width
        x = tl.load(x_rows + cols, mask=row_mask & (cols < dim), other=0).to(tl.float32)
        square = tl.sum(x * x, axis=1, keep_dims=True)
        plain = is_plain(square)
        centred = tl.where(plain, x * inverse_norm(tl.where(plain, square, 0)) - pilot, 0)
        wanted = row_mask & (plain == 0)
        mask = (rows < num_stored) & (wanted == 0) & (cols < width)
        tl.store(to_rows + cols, centred.to(centred_ptr.dtype.element_ty), mask=mask)
        if tl.max(wanted.to(tl.int32)) > 0:
            _centre_rows_long(
                x_rows, to_rows, wanted, wanted, pilot_ptr, bad_ptr, first_row + rows, dim, width, BLOCK_N, CHUNK_D
            )


@triton.jit(do_not_specialize=["first_row"])
def _centre_wide_kernel(
    x_ptr, pilot_ptr, centred_ptr, bad_ptr, num_rows, num_stored, dim, width, stride_xn, first_row,
    CHUNK_D: tl.constexpr,
):  # fmt: skip
    """Do the same for rows that do not fit in registers."""
    for row in range(tl.program_id(0), num_stored, tl.num_programs(0)):
        rows = row + tl.zeros([1, 1], tl.int64)
        _centre_rows_long(
            x_ptr + rows * stride_xn, centred_ptr + rows * width, rows < num_rows, rows < num_stored,
            pilot_ptr, bad_ptr, first_row + rows, dim, width, 1, CHUNK_D,
        )  # fmt: skip


@triton.jit
def _tile_position(tile, RATIO: tl.constexpr):
    """Return row and column of a tile: the lower triangle row by row, RATIO rows being as high as a column is wide."""
    group = tile // RATIO
    root = ((tl.sqrt_rn(8.0 * group + 1.0) - 1) / 2).to(tl.int32)
    # The largest number with root (root + 1) / 2 <= group, whichever way the float32 was rounded.
    root = tl.where(root * (root + 1) // 2 > group, root - 1, root)
    root = tl.where((root + 1) * (root + 2) // 2 <= group, root + 1, root)
    rest = tile - RATIO * (root * (root + 1) // 2)
    return root * RATIO + rest // (root + 1), rest % (root + 1)


@triton.jit
def _add_tile(products_ptr, tile, first_row, first_col, dim, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add what of the tile is not above the diagonal, some columns at a time: registers hold no more in float64."""
    if BLOCK_N > _ADDED_COLUMNS:
        left, right = halves(tile)
        _add_tile(products_ptr, left, first_row, first_col, dim, BLOCK_M, BLOCK_N // 2)
        _add_tile(products_ptr, right, first_row, first_col + BLOCK_N // 2, dim, BLOCK_M, BLOCK_N // 2)
    else:
        rows = first_row + tl.arange(0, BLOCK_M)[:, None]
        cols = first_col + tl.arange(0, BLOCK_N)[None, :]
        mask = (rows < dim) & (cols <= rows)
        tl.atomic_add(products_ptr + rows.to(tl.int64) * dim + cols, tile.to(tl.float64), mask=mask, sem="relaxed")


@triton.jit
def _products_kernel(
    centred_ptr, products_ptr, num_steps, num_tiles, dim, width,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add `centred^T centred`: all steps of all tiles in one line, of which every program does an equal share."""
    share = tl.cdiv(num_tiles * num_steps, tl.num_programs(0))
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, num_tiles * num_steps)
    rows = tl.arange(0, BLOCK_K) * width
    for tile in range(first // num_steps, tl.cdiv(last, num_steps)):
        tile_m, tile_n = _tile_position(tile, BLOCK_N // BLOCK_M)
        cols_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        start = tl.maximum(first - tile * num_steps, 0)
        stop = tl.minimum(last - tile * num_steps, num_steps)
        step_ptr = centred_ptr + (start * BLOCK_K).to(tl.int64) * width
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for _ in range(start, stop):
            a = tl.load(step_ptr + cols_m[:, None] + rows[None, :])
            b = tl.load(step_ptr + rows[:, None] + cols_n[None, :])
            total = tl.dot(a, b, total, input_precision=PRECISION)
            step_ptr += BLOCK_K * width
        _add_tile(products_ptr, total, tile_m * BLOCK_M, tile_n * BLOCK_N, dim, BLOCK_M, BLOCK_N)


class CovariancePlan(NamedTuple):
    """The launches of `covariance`.

    Attributes
    ----------
    tile : Tile
        Of the products; its `block_k` counts rows.
    dtype : torch.dtype
        Of the workspace.
    chunk_rows, width : int
        Shape of the workspace: whole steps and whole tiles.
    num_tiles : int
        In the lower triangle.
    num_programs : int
        At most so many multiply; each does an equal share of a chunk.
    """

    tile: Tile
    dtype: torch.dtype
    chunk_rows: int
    width: int
    num_tiles: int
    num_programs: int


def plan_covariance(
    num_rows: int, dim: int, device: torch.device, precision: str, *, hip: bool = ON_HIP
) -> CovariancePlan:
    """Return the launches for `num_rows` rows of `dim` elements."""
    dtype = torch.bfloat16 if precision == "fast" else torch.float32
    tile = plan_tile((dim, dim), dtype, dtype, dot_precision(precision, dtype, hip=hip), device, hip=hip)
    width = triton.cdiv(dim, tile.block_n) * tile.block_n
    ratio = tile.block_n // tile.block_m
    groups, rest = divmod(triton.cdiv(dim, tile.block_m), ratio)
    num_tiles = ratio * (groups * (groups + 1) // 2) + rest * (groups + 1)
    # A program adds up no more rows of a tile than a chunk has; where there are few tiles, several share the chunk.
    num_programs = count_processors(device) * max(1, 8 // tile.num_warps)
    longest = _FLOAT32_ROWS * max(1, num_programs // num_tiles)
    fitting = _WORKSPACE_BYTES // (width * dtype.itemsize)
    chunk_rows = max(_FLOAT32_ROWS, min(longest, fitting // _FLOAT32_ROWS * _FLOAT32_ROWS))
    chunk_rows = min(chunk_rows, triton.cdiv(num_rows, tile.block_k) * tile.block_k)
    return CovariancePlan(tile, dtype, chunk_rows, width, num_tiles, num_programs)


def plan_centring(num_rows: int, dim: int, device: torch.device) -> Plan:
    """Return the launch that fills the workspace."""
    return plan_rows(num_rows, dim, device)


def covariance(
    x: torch.Tensor,
    pilot: torch.Tensor,
    products: torch.Tensor,
    bad_rows: torch.Tensor,
    precision: str = "high",
    first_row: int = 0,
) -> None:
    """Add `sum_i (u_i - pilot)(u_i - pilot)^T` over the good rows, `u = pi(row)`; nothing waits for the device.

    The order of the float64 additions, and so the last bits, may differ from run to run.

    Parameters
    ----------
    x
        `(n, dim)`, float16, bfloat16 or float32, last axis contiguous.
    pilot
        `(dim,)` float64, near the mean of the unit rows; subtracted as float32.
    products
        `(dim, dim)` float64, contiguous: its lower triangle is added to, what is above the diagonal stays as it is.
    bad_rows
        `_rows.new_bad_rows`, added to.
    precision
        "exact": float32 products. "high": three TF32 products for each. "fast": products of bfloat16.
    first_row
        The number of `x[0]` in the whole, of which the first bad row is one.
    """
    num_rows, dim = x.shape
    if num_rows == 0:
        return
    plan = plan_covariance(num_rows, dim, x.device, precision)
    workspace = torch.empty((plan.chunk_rows, plan.width), dtype=plan.dtype, device=x.device)
    block_m, block_n, block_k, num_warps, num_stages = plan.tile
    with on_device(x.device):
        for part in x.split(plan.chunk_rows):
            num_steps = triton.cdiv(len(part), block_k)
            _centre(part, pilot, workspace[: num_steps * block_k], bad_rows, first_row)
            _products_kernel[(min(plan.num_programs, plan.num_tiles * num_steps),)](
                workspace, products, num_steps, plan.num_tiles, dim, plan.width,
                PRECISION=dot_precision(precision, plan.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
                **compile_options(num_warps, num_stages),
            )  # fmt: skip
            first_row += len(part)


def _centre(
    x: torch.Tensor, pilot: torch.Tensor, centred: torch.Tensor, bad_rows: torch.Tensor, first_row: int
) -> None:
    num_rows, dim = x.shape
    num_stored, width = centred.shape
    plan = plan_centring(num_stored, dim, x.device)
    sizes = num_rows, num_stored, dim, width, x.stride(0), first_row
    if dim <= MAX_BLOCK_D:
        _centre_kernel[(plan.num_programs,)](
            x, pilot, centred, bad_rows, *sizes,
            BLOCK_N=plan.block_n, BLOCK_D=plan.block_d, CHUNK_D=plan.chunk_d,
            **compile_options(plan.num_warps),
        )  # fmt: skip
    else:
        _centre_wide_kernel[(plan.num_programs,)](
            x, pilot, centred, bad_rows, *sizes,
            CHUNK_D=_WIDE_CHUNK_D, **compile_options(warps_of_chunk(_WIDE_CHUNK_D)),
        )  # fmt: skip
