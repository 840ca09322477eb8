"""A map applied to whatever a caller hands in: arrays, CPU tensors, tensors on a device."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._dtypes import Rows, empty, storage
from ._errors import raise_if_bad
from ._native import _C
from ._rows import as_rows, dtype_name, host_tensor, is_tensor, refuse_gradients
from ._steps import Affine, Noise
from .backends import choose, count_threads
from .methods import Parameters, ParametersTable, unit_length
from .moments import check_on_bad_rows

_NO_NOISE = Noise(0.0, 0)
_FLOAT64_ROWS = 1024  # of a batch at a time: bounds the temporaries


@dataclass(frozen=True)
class Steps:
    """What becomes of a row, one after the other; each may be missing, but not all.

    Attributes
    ----------
    affine : Affine or None
    table : ParametersTable or None
        The two projections; row `i` takes entry `domain[i]`, or all the first.
    domain : ndarray or None
        `(n,)` int64; not with another step.
    noise : Noise or None
    """

    affine: Affine | None
    table: ParametersTable | None
    domain: NDArray[np.int64] | None = None
    noise: Noise | None = None

    @classmethod
    def of(cls, parameters: Parameters, noise: Noise | None = None) -> Steps:
        """Return those of a map."""
        return cls(parameters.affine, parameters.alone, None, noise)

    @property
    def dims(self) -> tuple[int, int]:
        """Of the rows, and of the result."""
        if self.affine is not None:
            out_dim, dim = self.affine.matrix.shape
            return dim, out_dim
        assert self.table is not None
        dim = self.table[0].shift.size
        return dim, dim

    @property
    def single(self) -> bool:
        """Whether the two projections are all."""
        return self.affine is None and self.noise is None


def transform_by(
    steps: Steps,
    x: Any,
    out: Any,
    dtype: Any,
    *,
    backend: str,
    num_threads: int | None,
    on_bad_rows: str,
) -> Any:
    """Map the rows of `x`; as `Alignment.transform` says."""
    check_on_bad_rows(on_bad_rows, skip=False)
    dim, out_dim = steps.dims
    if backend not in ("auto", "cpu") or (is_tensor(x) and not x.is_cpu):
        return _transform_tensor(steps, x, out, dtype, on_bad_rows, backend)
    rows = as_rows(x, name="x", dim=dim)
    if out is None:
        out, target = _new_rows(x, rows, rows.dtype if dtype is None else dtype_name(dtype), out_dim)
        raise_if_bad(transform_rows(steps, rows, target, num_threads), on_bad_rows, "x")
        return out
    _check_out(x, out, dtype, out_dim)
    target = as_rows(out, name="out", dim=out_dim)
    in_place = np.may_share_memory(rows.values, target.values)
    if in_place and on_bad_rows == "raise":
        bad = _C.find_bad_rows(rows.values, rows.bfloat16, count_threads(num_threads))
        raise_if_bad(bad, on_bad_rows, "x")
    raise_if_bad(transform_rows(steps, rows, target, num_threads), on_bad_rows, "x")
    _copy_back(target, out)
    return out


def transform_rows(steps: Steps, rows: Rows, out: Rows, num_threads: int | None) -> tuple[int, int, int]:
    """Map rows of host memory into `out`; return `(num_zero, num_nonfinite, first_bad)`, bad rows being zeros."""
    arrays = rows.values, rows.bfloat16, out.values, out.bfloat16
    threads = count_threads(num_threads)
    table = steps.table
    if steps.domain is not None and table is not None:
        return _C.row_transform_by_domain(*arrays, table.row_maps, steps.domain, threads)
    if steps.single and table is not None:
        return _C.row_transform(*arrays, table[0].row_map, threads)
    affine, row_map, noise = steps.affine, table[0].row_map if table else None, steps.noise or _NO_NOISE
    if affine is not None and out.dtype == "float64":
        return _transform_float64(steps, affine, rows, out, threads)
    kernels = None if affine is None else affine.for_kernels
    return _C.staged_transform(*arrays, kernels, row_map, noise.std, noise.seed, noise.index, noise.first, threads)


def _transform_float64(steps: Steps, affine: Affine, rows: Rows, out: Rows, threads: int) -> tuple[int, int, int]:
    """Apply the matrix in float64, by NumPy, some rows at a time; then the other steps."""
    num_zero, num_nonfinite, first = 0, 0, -1
    project = unit_length(rows.values.shape[1]).row_map
    for start in range(0, len(rows.values), _FLOAT64_ROWS):
        part, target = (each[start : start + _FLOAT64_ROWS] for each in (rows.values, out.values))
        unit = np.empty(part.shape)
        bad = _C.row_transform(part, rows.bfloat16, unit, False, project, threads)
        num_zero, num_nonfinite = num_zero + bad[0], num_nonfinite + bad[1]
        first = start + bad[2] if first < 0 <= bad[2] else first
        moved = affine(unit)
        if steps.table is None:
            target[...] = moved
        else:
            rest = Steps(None, steps.table, None, steps.noise and steps.noise.of_rows(start, len(part)))
            transform_rows(rest, Rows(moved, "float64"), Rows(target, "float64"), threads)
    return num_zero, num_nonfinite, first


def _new_rows(x: Any, rows: Rows, dtype: str, out_dim: int) -> tuple[Any, Rows]:
    """Return an uninitialised result of the kind and shape of `x`, which `rows` are, and the same memory as rows."""
    values = empty((len(rows.values), out_dim), storage(dtype))
    new = Rows(values, dtype)
    if not isinstance(x, np.ndarray):
        # And not torch.empty: small batches take a quarter longer with it.
        out = host_tensor(values, dtype)
        return (out if x.ndim == 2 else out.reshape(*x.shape[:-1], out_dim)), new
    if x.ndim != 2:
        values = values.reshape(*x.shape[:-1], out_dim)
    if dtype != "bfloat16":
        return values, new
    if x.dtype.name != "bfloat16":
        raise TypeError("NumPy has no bfloat16: pass a torch tensor, or out= as an array of another dtype")
    return values.view(x.dtype), new


def _check_out(x: Any, out: Any, dtype: Any, out_dim: int) -> None:
    if is_tensor(out) != is_tensor(x):
        raise TypeError(f"out must be of the kind of x, {type(x).__name__}, got {type(out).__name__}")
    if tuple(out.shape) != (*x.shape[:-1], out_dim):
        raise ValueError(f"out must have the shape of x, {(*x.shape[:-1], out_dim)}, got {tuple(out.shape)}")
    if is_tensor(x) and out.device != x.device:
        raise ValueError(f"out must be on the device of x, {x.device}, got {out.device}")
    if dtype is not None and dtype_name(dtype) != dtype_name(out.dtype, name="out.dtype"):
        raise ValueError(f"dtype is {dtype_name(dtype)}, but out has {dtype_name(out.dtype)}: give one of them")


def _copy_back(target: Rows, out: Any) -> None:
    """Bring the result to `out` where its layout did not let the kernel write there."""
    if is_tensor(out):
        if target.values.ctypes.data != out.data_ptr() and target.values.size:
            out.copy_(host_tensor(target.values, target.dtype).reshape(out.shape))
    elif not np.may_share_memory(target.values, out):
        out[...] = target.values.view(out.dtype.newbyteorder("=")).reshape(out.shape)


def _transform_tensor(steps: Steps, x: Any, out: Any, dtype: Any, on_bad_rows: str, requested: str) -> Any:
    """Map a tensor where it lies, through Triton or plain torch."""
    dim, out_dim = steps.dims
    if not is_tensor(x):
        choose(requested, "cpu")
        raise TypeError(f"backend {requested!r} takes torch tensors, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] != dim:
        raise ValueError(f"x must have rows of dimension {dim}, got shape {tuple(x.shape)}")
    refuse_gradients(x, "x")
    name = dtype_name(x.dtype, name="x.dtype")
    if out is not None:
        _check_out(x, out, dtype, out_dim)
    result_name = dtype_name(dtype) if dtype else name if out is None else dtype_name(out.dtype, name="out.dtype")
    backend = import_module(f"._{choose(requested, str(x.device), (name, result_name))}_rows", __package__)
    rows = x.detach().reshape(-1, dim)
    # Straight into `out`, unless an error must leave it as it was.
    direct = out is not None and out.is_contiguous() and (on_bad_rows == "zero" or not _overlap(x, out))
    torch = sys.modules["torch"]
    result = out if direct else x.new_empty((*x.shape[:-1], out_dim), dtype=getattr(torch, result_name))
    if steps.single and steps.table is not None:
        numbers = None if steps.domain is None else torch.from_numpy(steps.domain).to(x.device)
        counts = backend.row_transform(rows, result.view(-1, dim), steps.table.on(x.device), numbers)
        read = partial(backend.read_bad_rows, counts)
    else:
        from ._torch_steps import read_bad_rows, staged_transform

        found = staged_transform(backend, rows, result.view(-1, out_dim), steps.affine, steps.table, steps.noise)
        read = partial(read_bad_rows, backend, found)
    if on_bad_rows == "raise":
        raise_if_bad(read(), on_bad_rows, "x")
    return result if out is None or direct else out.copy_(result)


def _overlap(x: Any, out: Any) -> bool:
    return bool(x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr())
