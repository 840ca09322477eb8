"""What kernels that multiply matrices share: the shape of their tiles, and the halves of one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._tuning import ON_HIP, shared_bytes

_ELEMENTS_PER_WARP = 1024  # of a tile, at least


class Tile(NamedTuple):
    """How a program multiplies matrices.

    Attributes
    ----------
    block_m, block_n : int
        Shape of a tile of the result, powers of two.
    block_k : int
        Terms of the sums at a time.
    num_warps : int
    num_stages : int
        Steps of which the operands are in flight or in use at once.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def plan_tile(
    shape: tuple[int, int],
    rows_dtype: torch.dtype,
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    *,
    hip: bool = ON_HIP,
) -> Tile:
    """Return how a result of that shape is computed.

    Its rows' operand is read as `rows_dtype`; both are multiplied as `dtype`, in that precision of `tl.dot`.
    """
    if precision == "ieee" and dtype == torch.float32 and not hip:  # without tensor cores: operands lie in registers
        block_m, block_n, block_k = 64, 64, 16
    else:
        block_m, block_n, block_k = 128, 512 // dtype.itemsize, 128 // rows_dtype.itemsize
    if precision == "tf32x3":  # twice the operands
        block_k //= 2
    # Tensor cores take no less than 16 rows and columns.
    block_m, block_n = (
        min(block, max(16, triton.next_power_of_2(size))) for block, size in zip((block_m, block_n), shape, strict=True)
    )
    num_warps = max(1, min(8, block_m * block_n // _ELEMENTS_PER_WARP))
    stage_bytes = (block_m * rows_dtype.itemsize + block_n * dtype.itemsize) * block_k
    num_stages = 2 if hip else max(2, min(4, shared_bytes(device) // stage_bytes))
    return Tile(block_m, block_n, block_k, num_warps, num_stages)


def dot_precision(precision: str, dtype: torch.dtype, *, hip: bool = ON_HIP) -> str:
    """Return what `tl.dot` calls the precision "exact", "high" or "fast" of products of that dtype."""
    return "tf32x3" if precision == "high" and dtype == torch.float32 and not hip else "ieee"


@triton.jit
def halves(tile):
    """Return the left and the right half of the columns: where a tile in other form would not fit in the registers."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1]))
