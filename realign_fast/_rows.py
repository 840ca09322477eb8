"""What a caller hands in, seen as `(n, dim)` rows: NumPy arrays, torch tensors, nothing copied that need not be."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ._dtypes import DTYPES, Rows


def is_tensor(x: object) -> TypeGuard[Any]:
    """Return whether `x` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def dtype_name(dtype: object, *, name: str = "dtype") -> str:
    """Return one of `DTYPES` for a name, a NumPy dtype, an ml_dtypes or a torch dtype.

    Raises
    ------
    TypeError
        If it is none of the four; integers are told how to dequantise.
    """
    text = _name_of(dtype)
    if text in DTYPES:
        return text
    if text in ("int8", "uint8"):
        raise TypeError(f"{name} is {text}: dequantise it first, for instance x.astype(numpy.float32) * scale + offset")
    raise TypeError(f"{name} must be one of {', '.join(DTYPES)}, got {text}")


@cache
def _name_of(dtype: Any) -> str:
    return getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")


def _row_dtype(x: Any, name: str) -> str:
    dtype = _name_of(x.dtype)
    return dtype if dtype in DTYPES else dtype_name(dtype, name=f"{name}.dtype")


def as_rows(x: object, *, name: str = "x", dim: int | None = None) -> Rows:
    """Return `x` of shape `(..., dim)` as rows in host memory, a view of it wherever its layout allows.

    Parameters
    ----------
    x
        NumPy array or CPU tensor of float16, bfloat16, float32 or float64.
    name
        What errors call it.
    dim
        The dimension it must have.

    Raises
    ------
    TypeError
        If it is no array or tensor, or of another dtype.
    ValueError
        If it has no axis, its dimension is 0 or not `dim`, or it is a tensor that records gradients.
    """
    if isinstance(x, np.ndarray):
        dtype = _row_dtype(x, name)
        values = x.view(np.uint16) if dtype == "bfloat16" else x
    elif is_tensor(x):
        values, dtype = _tensor_values(x, name)
    else:
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {type(x).__name__}")
    shape = values.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., dim) with dim of at least 1, got {shape}")
    if dim is not None and shape[-1] != dim:
        raise ValueError(f"{name} must have rows of dimension {dim}, got shape {shape}")
    if len(shape) != 2:
        values = values.reshape(-1, shape[-1])
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if values.strides[1] != values.itemsize and values.size:
        values = np.ascontiguousarray(values)
    return Rows(values, dtype)


def refuse_gradients(x: Any, name: str) -> None:
    """Raise ValueError if the tensor `x` records gradients: they would end here, silently."""
    if x.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise ValueError(f"{name} records gradients, which end here: use realign_fast.nn.ReAlign, or {name}.detach()")


def _tensor_values(x: Any, name: str) -> tuple[NDArray[Any], str]:
    dtype = _row_dtype(x, name)
    if x.requires_grad:
        refuse_gradients(x, name)
        x = x.detach()
    if not x.is_cpu:
        x = x.cpu()
    return host_values(x, dtype), dtype


def host_values(x: Any, dtype: str) -> NDArray[Any]:
    """Return the memory of a CPU tensor of `dtype` as an array of its shape, in `storage(dtype)`."""
    values: NDArray[Any] = x.view(sys.modules["torch"].int16).numpy() if dtype == "bfloat16" else x.numpy()
    return values.view(np.uint16) if dtype == "bfloat16" else values


def host_tensor(values: NDArray[Any], dtype: str) -> Any:
    """Return the memory of an array in `storage(dtype)` as a CPU tensor of its shape: `host_values` the other way."""
    torch = sys.modules["torch"]
    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
