"""The row transform in plain torch: correct on any device torch knows, fast on none."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .methods import Parameters

_CHUNK_ELEMENTS = 1 << 24  # bounds the temporaries


def row_transform(
    x: torch.Tensor, out: torch.Tensor, parameters: tuple[Parameters, ...], domain: NDArray[np.int64] | None
) -> tuple[int, int, int]:
    """Map row `i` of `x` `(n, dim)` by `parameters[domain[i]]`, or all by the first, into `out`; bad rows become zeros.

    Returns `(num_zero, num_nonfinite, first_bad)`. Computes in float64 where `x` or `out` is float64, else float32.
    """
    compute = torch.float64 if torch.float64 in (x.dtype, out.dtype) else torch.float32
    options: dict[str, Any] = {"dtype": compute, "device": x.device}
    fields = ("scale", "shift", "correction")
    tables = [torch.tensor(np.array([getattr(each, field) for each in parameters]), **options) for field in fields]
    scale, shift, correction = tables[0][:, None], tables[1], tables[2]
    numbers = None if domain is None else torch.from_numpy(domain).to(x.device)
    chunk = max(1, _CHUNK_ELEMENTS // x.shape[1])
    num_zero, num_nonfinite, first_bad = 0, 0, -1
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk].to(compute)
        largest = rows.abs().amax(dim=1, keepdim=True)
        zero, nonfinite = largest[:, 0] == 0, ~largest[:, 0].isfinite()
        bad = zero | nonfinite
        # Divided by the largest magnitude, no square overflows; bad rows are kept out of the arithmetic.
        rows = torch.where(bad[:, None], 0, rows / torch.where(bad[:, None], 1, largest))
        # One map for all rows, or that of each row.
        of = slice(0, 1) if numbers is None else numbers[start : start + chunk]
        mapped = _project(_project(_project(rows) * scale[of] + shift[of]) + correction[of])
        out[start : start + chunk] = mapped.masked_fill_(bad[:, None], 0)
        num_zero += int(zero.sum())
        num_nonfinite += int(nonfinite.sum())
        if first_bad < 0 and bool(bad.any()):
            first_bad = start + int(bad.to(torch.uint8).argmax())
    return num_zero, num_nonfinite, first_bad


def _project(rows: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm == 0, 1, norm)
