"""The row transform in Triton, on the GPU where the rows lie."""

from __future__ import annotations

import torch

from .kernels import row_transform as kernels
from .methods import Parameters


def row_transform(x: torch.Tensor, out: torch.Tensor, parameters: Parameters) -> tuple[int, int, int]:
    """Write `pi(pi(scale u + shift) + correction)` of `x` `(n, dim)` to `out`; a bad row becomes zeros.

    Returns `(num_zero, num_nonfinite, first_bad)`, for which it waits for the device.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    bad_rows = kernels.new_bad_rows(x.device)
    kernels.row_transform(x, out, _maps_on(x.device, parameters), bad_rows)
    num_zero, num_nonfinite, first = bad_rows.tolist()
    return num_zero, num_nonfinite, first if num_zero + num_nonfinite else -1


def _maps_on(device: torch.device, parameters: Parameters) -> kernels.Maps:
    maps = parameters.device_maps.get(device)
    if maps is None:
        table = ([parameters.scale], parameters.shift[None], parameters.correction[None])
        maps = kernels.Maps.of(*(torch.tensor(x, dtype=torch.float64, device=device) for x in table))
        parameters.device_maps[device] = maps
    return maps
