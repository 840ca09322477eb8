"""The row transform as operators of torch: one node with a gradient for autograd, compilers and exporters.

`realign_fast::row_transform` returns the mapped rows and, `(2,)` int64 on the device, how many rows were zero and how
many not finite; these become zeros, and their gradients too.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from ._dtypes import Rows
from ._native import _C
from ._rows import as_rows, dtype_name, host_values
from .backends import choose, count_threads
from .kernels._maps import Maps

Tensor = torch.Tensor


def _run(
    x: Tensor, scale: Tensor, shift: Tensor, correction: Tensor, scale64: Tensor, shift64: Tensor,
    correction64: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dim = shift.shape[-1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.is_cpu:
        rows, target = as_rows(x, dim=dim), _own_rows(out, dim)
        arrays = rows.values, rows.bfloat16, target.values, target.bfloat16
        row_map = _row_map(scale64, shift64, correction64)
        return out, torch.tensor(_C.row_transform(*arrays, row_map, count_threads(None))[:2])
    maps = Maps(scale, shift, correction, scale64, shift64, correction64)
    counts = _backend(x, out).row_transform(x.reshape(-1, dim), out.view(-1, dim), maps, None)
    return out, counts[:2]


def _run_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, correction: Tensor, scale64: Tensor, shift64: Tensor,
    correction64: Tensor,
) -> Tensor:  # fmt: skip
    dim = shift.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.is_cpu:
        rows, grad = as_rows(x.detach(), dim=dim), as_rows(grad_out.detach(), name="grad_out", dim=dim)
        arrays = rows.values, rows.bfloat16, grad.values, grad.bfloat16, _own_rows(grad_x, dim).values
        _C.row_transform_backward(*arrays, _row_map(scale64, shift64, correction64), count_threads(None))
        return grad_x
    maps = Maps(scale, shift, correction, scale64, shift64, correction64)
    flat = x.reshape(-1, dim), grad_out.reshape(-1, dim), grad_x.view(-1, dim)
    _backend(x, grad_out).row_transform_backward(*flat, maps)
    return grad_x


def _own_rows(x: Tensor, dim: int) -> Rows:
    """Return a contiguous CPU tensor, one to write to, as rows."""
    name = dtype_name(x.dtype)
    return Rows(host_values(x, name).reshape(-1, dim), name)


def _row_map(scale: Tensor, shift: Tensor, correction: Tensor) -> _C.RowMap:
    return _C.RowMap(scale.item(), shift.flatten().numpy(), correction.flatten().numpy())


def _backend(*rows: Tensor) -> Any:
    chosen = choose("auto", str(rows[0].device), [dtype_name(each.dtype) for each in rows])
    return import_module("._triton_rows" if chosen == "triton" else "._torch_rows", __package__)


# Schemas in words: with annotations as text, torch could not infer them.
_MAPS = "Tensor scale, Tensor shift, Tensor correction, Tensor scale64, Tensor shift64, Tensor correction64"
row_transform = torch.library.custom_op(
    "realign_fast::row_transform",
    _run,
    mutates_args=(),
    schema=f"(Tensor x, {_MAPS}, ScalarType dtype) -> (Tensor, Tensor)",
)
row_transform_backward = torch.library.custom_op(
    "realign_fast::row_transform_backward",
    _run_backward,
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor x, {_MAPS}) -> Tensor",
)


@row_transform.register_fake
def _(x: Tensor, *maps_and_dtype: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=maps_and_dtype[-1]), x.new_empty(2, dtype=torch.int64)


@row_transform_backward.register_fake
def _(grad_out: Tensor, x: Tensor, *maps: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *maps, _ = inputs
    ctx.save_for_backward(x, *maps)


def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return row_transform_backward(grad_out, *ctx.saved_tensors), *[None] * 7


row_transform.register_autograd(_backward, setup_context=_setup_context)


def transform(x: Tensor, *maps_and_dtype: Any) -> tuple[Tensor, Tensor]:
    """Return what the operator does, without the time of the way through torch where nothing there must see it."""
    seen = torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())
    if seen or type(x) is not Tensor:
        result: tuple[Tensor, Tensor] = row_transform(x, *maps_and_dtype)
        return result
    return _run(x, *maps_and_dtype)
