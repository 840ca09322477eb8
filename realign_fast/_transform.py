"""A map applied to whatever a caller hands in: arrays, CPU tensors, tensors on a device."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _C
from ._dtypes import Rows, empty, storage
from ._errors import BadRowsError
from ._rows import as_rows, dtype_name, host_values, is_tensor, refuse_gradients
from .backends import choose, count_threads
from .methods import ParametersTable
from .moments import check_on_bad_rows


def raise_if_bad(bad: tuple[int, int, int], on_bad_rows: str) -> None:
    num_zero, num_nonfinite, first = bad
    if first >= 0 and on_bad_rows == "raise":
        raise BadRowsError("x", first, num_zero, num_nonfinite)


def transform_by(
    parameters: ParametersTable,
    domain: NDArray[np.int64] | None,
    x: Any,
    out: Any,
    dtype: Any,
    *,
    backend: str,
    num_threads: int | None,
    on_bad_rows: str,
) -> Any:
    """Map row `i` of `x` by `parameters[domain[i]]`, or all rows by the first; as `Alignment.transform` says."""
    check_on_bad_rows(on_bad_rows, skip=False)
    dim = parameters[0].shift.size
    if backend not in ("auto", "cpu") or (is_tensor(x) and not x.is_cpu):
        return _transform_tensor(parameters, domain, x, out, dtype, dim, on_bad_rows, backend)
    rows = as_rows(x, name="x", dim=dim)
    if out is None:
        out, target = _new_rows(x, rows, rows.dtype if dtype is None else dtype_name(dtype))
        raise_if_bad(transform_rows(parameters, domain, rows, target, num_threads), on_bad_rows)
        return out
    _check_out(x, out, dtype)
    target = as_rows(out, name="out", dim=dim)
    in_place = np.may_share_memory(rows.values, target.values)
    if in_place and on_bad_rows == "raise":
        bad = _C.find_bad_rows(rows.values, rows.bfloat16, count_threads(num_threads))
        raise_if_bad(bad, on_bad_rows)
    raise_if_bad(transform_rows(parameters, domain, rows, target, num_threads), on_bad_rows)
    _copy_back(target, out)
    return out


def transform_rows(
    parameters: ParametersTable,
    domain: NDArray[np.int64] | None,
    rows: Rows,
    out: Rows,
    num_threads: int | None,
) -> tuple[int, int, int]:
    arrays = rows.values, rows.bfloat16, out.values, out.bfloat16
    threads = count_threads(num_threads)
    if domain is None:
        return _C.row_transform(*arrays, parameters[0].row_map, threads)
    return _C.row_transform_by_domain(*arrays, parameters.row_maps, domain, threads)


def _new_rows(x: Any, rows: Rows, dtype: str) -> tuple[Any, Rows]:
    """Return an uninitialised result of the kind and shape of `x`, which `rows` are, and the same memory as rows."""
    if not isinstance(x, np.ndarray):
        torch = sys.modules["torch"]
        same = dtype == rows.dtype and x.is_contiguous()
        out = torch.empty_like(x) if same else torch.empty(x.shape, dtype=getattr(torch, dtype))
        return out, Rows(host_values(out, dtype).reshape(rows.values.shape), dtype)
    values = empty(rows.values.shape, storage(dtype))
    new = Rows(values, dtype)
    if x.ndim != 2:
        values = values.reshape(x.shape)
    if dtype != "bfloat16":
        return values, new
    if x.dtype.name != "bfloat16":
        raise TypeError("NumPy has no bfloat16: pass a torch tensor, or out= as an array of another dtype")
    return values.view(x.dtype), new


def _check_out(x: Any, out: Any, dtype: Any) -> None:
    if is_tensor(out) != is_tensor(x):
        raise TypeError(f"out must be of the kind of x, {type(x).__name__}, got {type(out).__name__}")
    if tuple(out.shape) != tuple(x.shape):
        raise ValueError(f"out must have the shape of x, {tuple(x.shape)}, got {tuple(out.shape)}")
    if is_tensor(x) and out.device != x.device:
        raise ValueError(f"out must be on the device of x, {x.device}, got {out.device}")
    if dtype is not None and dtype_name(dtype) != dtype_name(out.dtype, name="out.dtype"):
        raise ValueError(f"dtype is {dtype_name(dtype)}, but out has {dtype_name(out.dtype)}: give one of them")


def _copy_back(target: Rows, out: Any) -> None:
    """Bring the result to `out` where its layout did not let the kernel write there."""
    if is_tensor(out):
        torch = sys.modules["torch"]
        if target.values.ctypes.data != out.data_ptr() and target.values.size:
            values = torch.from_numpy(target.values.view(np.int16) if target.bfloat16 else target.values)
            out.copy_((values.view(torch.bfloat16) if target.bfloat16 else values).reshape(out.shape))
    elif not np.may_share_memory(target.values, out):
        out[...] = target.values.view(out.dtype.newbyteorder("=")).reshape(out.shape)


def _transform_tensor(
    parameters: ParametersTable,
    domain: NDArray[np.int64] | None,
    x: Any,
    out: Any,
    dtype: Any,
    dim: int,
    on_bad_rows: str,
    requested: str,
) -> Any:
    """Map a tensor where it lies, through Triton or plain torch."""
    if not is_tensor(x):
        choose(requested, "cpu")
        raise TypeError(f"backend {requested!r} takes torch tensors, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] != dim:
        raise ValueError(f"x must have rows of dimension {dim}, got shape {tuple(x.shape)}")
    refuse_gradients(x, "x")
    name = dtype_name(x.dtype, name="x.dtype")
    if out is not None:
        _check_out(x, out, dtype)
    result_name = dtype_name(dtype) if dtype else name if out is None else dtype_name(out.dtype, name="out.dtype")
    backend = import_module(f"._{choose(requested, str(x.device), (name, result_name))}_rows", __package__)
    rows = x.detach().reshape(-1, dim)
    numbers = None if domain is None else sys.modules["torch"].from_numpy(domain).to(x.device)
    # Straight into `out`, unless an error must leave it as it was.
    direct = out is not None and out.is_contiguous() and (on_bad_rows == "zero" or not _overlap(x, out))
    result = out if direct else x.new_empty(x.shape, dtype=getattr(sys.modules["torch"], result_name))
    counts = backend.row_transform(rows, result.view(-1, dim), parameters.on(x.device), numbers)
    if on_bad_rows == "raise":
        raise_if_bad(backend.read_bad_rows(counts), on_bad_rows)
    return result if out is None or direct else out.copy_(result)


def _overlap(x: Any, out: Any) -> bool:
    return bool(x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr())
