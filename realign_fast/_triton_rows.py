"""The kernels in Triton, on the GPU where the rows lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .kernels import _rows
from .kernels import moments as moments_kernels
from .kernels import row_transform as kernels
from .methods import Parameters


def row_transform(
    x: torch.Tensor, out: torch.Tensor, parameters: tuple[Parameters, ...], domain: NDArray[np.int64] | None
) -> tuple[int, int, int]:
    """Map row `i` of `x` `(n, dim)` by `parameters[domain[i]]`, or all by the first, into `out`; bad rows become zeros.

    Returns `(num_zero, num_nonfinite, first_bad)`, for which it waits for the device.
    """
    bad_rows = _rows.new_bad_rows(x.device)
    maps = _maps_on(x.device, parameters[0])
    numbers = None
    if domain is not None:
        tables = zip(*(_maps_on(x.device, each) for each in parameters), strict=True)
        maps = kernels.Maps(*(torch.cat(table) for table in tables))
        numbers = torch.from_numpy(domain).to(x.device)
    kernels.row_transform(_with_contiguous_rows(x), out, maps, bad_rows, numbers)
    return _rows.read_bad_rows(bad_rows)


def moments(x: torch.Tensor) -> tuple[NDArray[np.int64], tuple[int, int, int]]:
    """Return the fixed-point sums `(dim,)` of the good rows of `x` `(n, dim)`, and `row_transform`'s counts."""
    sums = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
    bad_rows = _rows.new_bad_rows(x.device)
    moments_kernels.moments(_with_contiguous_rows(x), sums, bad_rows)
    values: NDArray[Any] = sums.cpu().numpy()
    return values, _rows.read_bad_rows(bad_rows)


def _with_contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _maps_on(device: torch.device, parameters: Parameters) -> kernels.Maps:
    maps = parameters.device_maps.get(device)
    if maps is None:
        table = ([parameters.scale], parameters.shift[None], parameters.correction[None])
        maps = kernels.Maps.of(*(torch.tensor(x, dtype=torch.float64, device=device) for x in table))
        parameters.device_maps[device] = maps
    return maps
