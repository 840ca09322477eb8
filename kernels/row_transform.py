"""The fused row map `out = pi(pi(s u + c) + b)`, `u = pi(x)`: one read and one write of a row.

Maps come as a table, so that one launch serves rows of many domains.

Source: ReAlign (arXiv 2602.07026), Anchor, Trace and Centroid alignment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._maps import Maps
from ._rows import count_bad, inverse_norm, is_good, is_plain, on_device, square64, to_fixed
from ._tuning import MAX_BLOCK_D, Plan, compile_options, plan_rows, warps_of_chunk

# For squared norms below this, and for fewer columns, the float32 form loses digits.
_SMALLEST_FUSED_SQUARE = tl.constexpr(0.25)
SMALLEST_FUSED_DIM = 64
# Nine sums in float64 for each of these columns have room in the registers.
_WIDE_CHUNK_D = 512


@triton.jit
def is_fused(square, square1, square2, FUSED: tl.constexpr):
    """Whether the float32 form serves rows of these squared norms: of the row, and before both projections after it."""
    plain = is_plain(square) & (square1 >= _SMALLEST_FUSED_SQUARE) & (square2 >= _SMALLEST_FUSED_SQUARE)
    return plain & FUSED


@triton.jit
def map_rows(x, scale, shift, correction, FUSED: tl.constexpr):
    """Map a tile of whole rows in float32; return it and which of its rows that serves."""
    square = tl.sum(x * x, axis=1, keep_dims=True)
    e = x * (scale * inverse_norm(square)) + shift
    square1 = tl.sum(e * e, axis=1, keep_dims=True)
    e = e * inverse_norm(square1) + correction
    square2 = tl.sum(e * e, axis=1, keep_dims=True)
    return e * inverse_norm(square2), is_fused(square, square1, square2, FUSED)


@triton.jit
def _norms(s, x_x, x_c, x_b, c_c, c_b, b_b):
    """From inner products of row, shift and correction: 1 / ||x||, v . b, and both later norms, squared and inverse.

    For `u = x / ||x||`, `v = pi(s u + c)`, `out = pi(v + b)`.
    """
    r = inverse_norm(x_x)
    square1 = s * s + 2 * s * r * x_c + c_c
    inverse1 = inverse_norm(tl.where(square1 > 0, square1, 0))
    v_b = (s * r * x_b + c_b) * inverse1
    square2 = 1 + 2 * v_b + b_b
    inverse2 = inverse_norm(tl.where(square2 > 0, square2, 0))
    return r, v_b, square1, inverse1, square2, inverse2


@triton.jit
def _mapped_chunk(x_rows, cols, mask, maps, scale, inverse1, shift_ptr, correction_ptr, dim):
    """Compute some columns of `pi(s u + c) + b` in float64, or of `s u + c` where there is no correction."""
    e = scale * tl.load(x_rows + cols, mask=mask, other=0).to(tl.float64)
    e += tl.load(shift_ptr + maps * dim + cols, mask=mask, other=0)
    if correction_ptr is not None:
        e = e * inverse1 + tl.load(correction_ptr + maps * dim + cols, mask=mask, other=0)
    return e


@triton.jit
def map_rows_long(
    x_rows, to_rows, wanted, maps, scale_ptr, shift_ptr, correction_ptr, bad_ptr, rows, dim,
    ADD: tl.constexpr, UNITS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """Map the `wanted` rows in float64, a chunk at a time, whatever their magnitude; count the bad ones.

    They are stored to `to_rows`, bad ones as zeros; or, where ADD, rounded to UNITS a one and added there.
    """
    square = square64(x_rows, wanted, dim, BLOCK_N, CHUNK_D)
    good = count_bad(square, wanted, bad_ptr, rows)
    scale = tl.load(scale_ptr + maps) * inverse_norm(tl.where(good, square, 0))
    square = tl.zeros([BLOCK_N, 1], tl.float64)
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        e = _mapped_chunk(x_rows, cols, good & (cols < dim), maps, scale, 1.0, shift_ptr, None, dim)
        square += tl.sum(e * e, axis=1, keep_dims=True)
    inverse1 = inverse_norm(square)
    square = tl.zeros([BLOCK_N, 1], tl.float64)
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        e = _mapped_chunk(x_rows, cols, good & (cols < dim), maps, scale, inverse1, shift_ptr, correction_ptr, dim)
        square += tl.sum(e * e, axis=1, keep_dims=True)
    inverse2 = inverse_norm(square)
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        e = _mapped_chunk(x_rows, cols, good & (cols < dim), maps, scale, inverse1, shift_ptr, correction_ptr, dim)
        if ADD:
            fixed = tl.sum(to_fixed(e * inverse2 * UNITS).to(tl.int64), axis=0, keep_dims=True)
            tl.atomic_add(to_rows + cols, fixed, mask=cols < dim)
        else:
            # By way of float32: the interpreter cannot round float64 to bfloat16.
            out = (e * inverse2).to(tl.float32).to(to_rows.dtype.element_ty)
            tl.store(to_rows + cols, out, mask=wanted & (cols < dim))


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
        out, plain = map_rows(x, scale, shift, correction, FUSED)
        tl.store(out_ptr + rows * stride_on + cols, out.to(out_ptr.dtype.element_ty), mask=mask & plain)
        wanted = row_mask & (plain == 0)
        if tl.max(wanted.to(tl.int32)) > 0:
            map_rows_long(
                x_ptr + rows * stride_xn, out_ptr + rows * stride_on, wanted, maps, scale64_ptr, shift64_ptr,
                correction64_ptr, bad_ptr, rows, dim, False, 1, BLOCK_N, CHUNK_D,
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
        r, _, square1, inverse1, square2, inverse2 = _norms(
            scale, square, tl.sum(x_c, axis=1, keep_dims=True), tl.sum(x_b, axis=1, keep_dims=True),
            tl.sum(c_c, axis=1, keep_dims=True), tl.sum(c_b, axis=1, keep_dims=True),
            tl.sum(b_b, axis=1, keep_dims=True),
        )  # fmt: skip
        plain = is_fused(square, square1, square2, FUSED)
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
            map_rows_long(
                x_rows, out_rows, wanted, maps, scale64_ptr, shift64_ptr, correction64_ptr, bad_ptr, rows, dim,
                False, 1, BLOCK_N, CHUNK_D,
            )  # fmt: skip


@triton.jit
def _gradient_factors(s, x_x, x_c, x_b, x_g, c_c, c_b, b_b, c_g, b_g):
    """From the inner products of row, shift, correction and gradient `g`: the factors of g, x, c and b in `grad_x`.

    For `u = r x`, `v = pi(s u + c)`, `out = pi(v + b)`: each projection `z / n` has the gradient `(g - p (p . g)) / n`
    with `p = pi(z)`, and the products that it needs follow from those given. Also the squares of both `n`.
    """
    r, v_b, square1, inverse1, square2, inverse2 = _norms(s, x_x, x_c, x_b, c_c, c_b, b_b)
    u_c, u_b, u_g = r * x_c, r * x_b, r * x_g
    u_v = (s + u_c) * inverse1
    v_g = (s * u_g + c_g) * inverse1
    out_g = (v_g + b_g) * inverse2
    along_b = out_g * inverse2 * inverse2
    v_g2 = v_g * inverse2 - along_b * (1 + v_b)
    u_g2 = u_g * inverse2 - along_b * (u_v + u_b)
    u_g1 = (u_g2 - u_v * v_g2) * inverse1
    along_v = (along_b + v_g2) * inverse1 * inverse1
    scale = s * r
    grad_of_x = -scale * r * (s * along_v + u_g1)
    return scale * inverse1 * inverse2, grad_of_x, -scale * along_v, -scale * along_b * inverse1, square1, square2


@triton.jit
def _backward_rows_long(
    x_rows, grad_rows, to_rows, wanted, scale_ptr, shift_ptr, correction_ptr, dim,
    BLOCK_N: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the `wanted` rows in float64, in two sweeps, whatever their magnitude; 0 for bad rows."""
    x_x = tl.zeros([BLOCK_N, CHUNK_D], tl.float64)
    x_c, x_b, x_g, c_c, c_b, b_b, c_g, b_g = x_x, x_x, x_x, x_x, x_x, x_x, x_x, x_x
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        mask = wanted & (cols < dim)
        x = tl.load(x_rows + cols, mask=mask, other=0).to(tl.float64)
        g = tl.load(grad_rows + cols, mask=mask, other=0).to(tl.float64)
        shift = tl.load(shift_ptr + cols, mask=cols < dim, other=0)
        correction = tl.load(correction_ptr + cols, mask=cols < dim, other=0)
        x_x += x * x
        x_c += x * shift
        x_b += x * correction
        x_g += x * g
        c_c += shift * shift
        c_b += shift * correction
        b_b += correction * correction
        c_g += shift * g
        b_g += correction * g
    x_x = tl.sum(x_x, axis=1, keep_dims=True)
    good = wanted & is_good(x_x)
    of_g, of_x, of_c, of_b, square1, square2 = _gradient_factors(
        tl.load(scale_ptr), tl.where(good, x_x, 0), tl.sum(x_c, axis=1, keep_dims=True),
        tl.sum(x_b, axis=1, keep_dims=True), tl.sum(x_g, axis=1, keep_dims=True), tl.sum(c_c, axis=1, keep_dims=True),
        tl.sum(c_b, axis=1, keep_dims=True), tl.sum(b_b, axis=1, keep_dims=True), tl.sum(c_g, axis=1, keep_dims=True),
        tl.sum(b_g, axis=1, keep_dims=True),
    )  # fmt: skip
    good = good & (square1 > 0) & (square2 > 0)  # pi(0) = 0 has no gradient
    for start in range(0, dim, CHUNK_D):
        cols = start + tl.arange(0, CHUNK_D)[None, :]
        mask = good & (cols < dim)
        grad = of_g * tl.load(grad_rows + cols, mask=mask, other=0).to(tl.float64)
        grad += of_x * tl.load(x_rows + cols, mask=mask, other=0).to(tl.float64)
        grad += of_c * tl.load(shift_ptr + cols, mask=mask, other=0)
        grad += of_b * tl.load(correction_ptr + cols, mask=mask, other=0)
        grad = tl.where(good, grad, 0).to(tl.float32).to(to_rows.dtype.element_ty)
        tl.store(to_rows + cols, grad, mask=wanted & (cols < dim))


@triton.jit
def _row_transform_backward_kernel(
    x_ptr, grad_out_ptr, grad_x_ptr, scale_ptr, shift_ptr, correction_ptr, scale64_ptr, shift64_ptr, correction64_ptr,
    num_rows, dim, stride_xn, stride_gn, stride_dn,
    FUSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)[None, :]
    col_mask = cols < dim
    scale = tl.load(scale_ptr)
    shift = tl.load(shift_ptr + cols, mask=col_mask, other=0)
    correction = tl.load(correction_ptr + cols, mask=col_mask, other=0)
    c_c = tl.sum(shift * shift, axis=1, keep_dims=True)
    c_b = tl.sum(shift * correction, axis=1, keep_dims=True)
    b_b = tl.sum(correction * correction, axis=1, keep_dims=True)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0)):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        row_mask = rows < num_rows
        mask = row_mask & col_mask
        x = tl.load(x_ptr + rows * stride_xn + cols, mask=mask, other=0).to(tl.float32)
        g = tl.load(grad_out_ptr + rows * stride_gn + cols, mask=mask, other=0).to(tl.float32)
        x_x = tl.sum(x * x, axis=1, keep_dims=True)
        of_g, of_x, of_c, of_b, square1, square2 = _gradient_factors(
            scale, x_x, tl.sum(x * shift, axis=1, keep_dims=True), tl.sum(x * correction, axis=1, keep_dims=True),
            tl.sum(x * g, axis=1, keep_dims=True), c_c, c_b, b_b, tl.sum(g * shift, axis=1, keep_dims=True),
            tl.sum(g * correction, axis=1, keep_dims=True),
        )  # fmt: skip
        grad = of_g * g + of_x * x + of_c * shift + of_b * correction
        plain = is_fused(x_x, square1, square2, FUSED)
        to_rows = grad_x_ptr + rows * stride_dn
        tl.store(to_rows + cols, grad.to(grad_x_ptr.dtype.element_ty), mask=mask & plain)
        wanted = row_mask & (plain == 0)
        if tl.max(wanted.to(tl.int32)) > 0:
            _backward_rows_long(
                x_ptr + rows * stride_xn, grad_out_ptr + rows * stride_gn, to_rows, wanted,
                scale64_ptr, shift64_ptr, correction64_ptr, dim, BLOCK_N, CHUNK_D,
            )  # fmt: skip


@triton.jit
def _row_transform_backward_wide_kernel(
    x_ptr, grad_out_ptr, grad_x_ptr, scale64_ptr, shift64_ptr, correction64_ptr,
    num_rows, dim, stride_xn, stride_gn, stride_dn, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """Rows that do not fit in registers."""
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        rows = row + tl.zeros([1, 1], tl.int64)
        _backward_rows_long(
            x_ptr + rows * stride_xn, grad_out_ptr + rows * stride_gn, grad_x_ptr + rows * stride_dn, rows >= 0,
            scale64_ptr, shift64_ptr, correction64_ptr, dim, 1, CHUNK_D,
        )  # fmt: skip


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
        `_rows.new_bad_rows`, added to.
    domain
        `(n,)` integers: the number of each row's map. None: all rows have map 0. Not checked here.
    """
    num_rows, dim = x.shape
    if num_rows == 0:
        return
    plan = plan_rows(num_rows, dim, x.device)
    kernel = _row_transform_kernel if dim <= MAX_BLOCK_D else _row_transform_wide_kernel
    with on_device(x.device):
        kernel[(plan.num_programs,)](
            x, out, x if domain is None else domain, *maps, bad_rows, num_rows, dim, x.stride(0), out.stride(0),
            HAS_DOMAIN=domain is not None, FUSED=dim >= SMALLEST_FUSED_DIM,
            BLOCK_N=plan.block_n, BLOCK_D=plan.block_d, CHUNK_D=plan.chunk_d,
            **compile_options(plan.num_warps),
        )  # fmt: skip


def plan_backward(num_rows: int, dim: int, device: torch.device) -> Plan:
    """Return the launch of `row_transform_backward`: two tiles of rows in registers, so each half as large."""
    return plan_rows(num_rows, dim, device, max_block_n=8, elements_per_warp=512)


def row_transform_backward(x: torch.Tensor, grad_out: torch.Tensor, grad_x: torch.Tensor, maps: Maps) -> None:
    """Write the gradient with respect to `x`, given that with respect to what its first map makes of it.

    Parameters
    ----------
    x, grad_out, grad_x
        `(n, dim)` on one device, float16, bfloat16 or float32, last axis contiguous. Bad rows have gradient 0.
    maps
        Of that dimension, on that device.
    """
    num_rows, dim = x.shape
    if num_rows == 0:
        return
    plan = plan_backward(num_rows, dim, x.device)
    sizes = num_rows, dim, x.stride(0), grad_out.stride(0), grad_x.stride(0)
    with on_device(x.device):
        if dim <= MAX_BLOCK_D:
            _row_transform_backward_kernel[(plan.num_programs,)](
                x, grad_out, grad_x, *maps, *sizes,
                FUSED=dim >= SMALLEST_FUSED_DIM, BLOCK_N=plan.block_n, BLOCK_D=plan.block_d, CHUNK_D=plan.chunk_d,
                **compile_options(plan.num_warps),
            )  # fmt: skip
        else:
            _row_transform_backward_wide_kernel[(plan.num_programs,)](
                x, grad_out, grad_x, *maps[3:], *sizes,
                CHUNK_D=_WIDE_CHUNK_D, **compile_options(warps_of_chunk(_WIDE_CHUNK_D)),
            )  # fmt: skip
