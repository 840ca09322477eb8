"""A table of maps as tensors: torch alone, for those who do without Triton too."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Maps(NamedTuple):
    """Maps on one device: `scale` (m,), `shift` and `correction` (m, dim), contiguous, in float32 and in float64.

    The kernels take float64 for the rows that need it. Where a device has none, these stay on the CPU.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    correction: torch.Tensor
    scale64: torch.Tensor
    shift64: torch.Tensor
    correction64: torch.Tensor

    @classmethod
    def of(cls, scale: torch.Tensor, shift: torch.Tensor, correction: torch.Tensor) -> Maps:
        """Return float64 parameters in both precisions."""
        exact = tuple(x.contiguous() for x in (scale, shift, correction))
        return cls(*(x.float() for x in exact), *exact)
