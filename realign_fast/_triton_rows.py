"""The kernels in Triton, on the GPU where the rows lie; nothing here waits for it but `read_bad_rows`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from . import _torch_rows
from ._steps import Affine, Noise
from .kernels import _rows
from .kernels import covariance as covariance_kernels
from .kernels import moments as moments_kernels
from .kernels import noise as noise_kernels
from .kernels import row_transform as kernels
from .kernels import whitening as whitening_kernels
from .kernels._maps import Maps
from .kernels._rows import read_bad_rows as read_bad_rows
from .kernels.whitening import Weights


def row_transform(x: torch.Tensor, out: torch.Tensor, maps: Maps, domain: torch.Tensor | None) -> torch.Tensor:
    """Map row `i` of `x` `(n, dim)` by map `domain[i]`, or all by the first, into `out`; bad rows become zeros.

    Returns counts of them for `read_bad_rows`, the first two being `num_zero` and `num_nonfinite`.
    """
    bad_rows: torch.Tensor = _rows.new_bad_rows(x.device)
    kernels.row_transform(with_contiguous_rows(x), out, maps, bad_rows, domain)
    return bad_rows


def noisy_row_transform(x: torch.Tensor, out: torch.Tensor, maps: Maps, noise: Noise) -> torch.Tensor:
    """As `row_transform` by the first map, with `noise` before the last projection; bad rows become zeros."""
    if x.shape[1] > noise_kernels.MAX_NOISY_D:
        mapped = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        counts = row_transform(x, mapped, maps, None)
        out.copy_(_torch_rows.add_noise(mapped, noise))
        return counts
    numbers = noise.first if noise.index is None else torch.from_numpy(noise.index).to(x.device)
    bad_rows: torch.Tensor = _rows.new_bad_rows(x.device)
    rows = with_contiguous_rows(x)
    noise_kernels.noisy_row_transform(rows, out, maps, bad_rows, noise.std, noise.seed, numbers)
    return bad_rows


def affine(x: torch.Tensor, out: torch.Tensor, step: Affine) -> torch.Tensor:
    """Write `matrix u + offset` of each row of `x` `(n, dim)` to `out` `(n, out_dim)`; zeros for bad ones.

    Returns counts of them for `read_bad_rows`.
    """

    def make(step: Affine) -> Weights:
        weights = Weights.of(torch.tensor(step.matrix), torch.tensor(step.centre), x.dtype)
        # The kernel subtracts an offset from the product with the whole row: that of the centre, less what is added.
        offset = weights.offset - torch.tensor(step.centred_offset, dtype=torch.float32)
        return Weights(weights.weight.to(x.device), weights.scale, offset.to(x.device))

    bad_rows: torch.Tensor = _rows.new_bad_rows(x.device)
    whitening_kernels.whiten(with_contiguous_rows(x), step.on((x.device, x.dtype), make), out, bad_rows)
    return bad_rows


def row_transform_backward(x: torch.Tensor, grad_out: torch.Tensor, grad_x: torch.Tensor, maps: Maps) -> None:
    """Write the gradient with respect to `x`, given that with respect to what the first map makes of it."""
    rows, grad = with_contiguous_rows(x), with_contiguous_rows(grad_out)
    kernels.row_transform_backward(rows, grad, grad_x, maps)


class Accumulator:
    """Fixed-point sums of unit rows, and counts of bad rows, that stay on a device until they are asked for.

    Parameters
    ----------
    dim, device
        Of the rows.
    pilot
        Add up products too, of the unit rows less this.
    precision
        Of the products: "exact", "high" or "fast".

    Attributes
    ----------
    num_rows : int
        Rows added, bad ones among them.
    """

    def __init__(
        self,
        dim: int,
        device: torch.device,
        pilot: NDArray[np.float64] | None = None,
        precision: str = "high",
    ) -> None:
        self.num_rows = 0
        self._precision = precision
        self._products = None
        if pilot is not None:
            self._pilot = torch.from_numpy(pilot).to(device)
            self._products = torch.zeros((dim, dim), dtype=torch.float64, device=device)
        self._sums = torch.zeros(dim, dtype=torch.int64, device=device)
        self._bad_rows = _rows.new_bad_rows(device)

    def add(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> None:
        """Add the good rows of `x` `(n, dim)`; `keys` (n,) receives a hash of each row's content, 0 for bad rows."""
        rows = with_contiguous_rows(x)
        moments_kernels.moments(rows, self._sums, self._bad_rows, self.num_rows, keys)
        if self._products is not None:
            counted_above = _rows.new_bad_rows(x.device)
            covariance_kernels.covariance(rows, self._pilot, self._products, counted_above, self._precision)
        self.num_rows += len(x)

    def add_transformed(self, x: torch.Tensor, maps: Maps) -> None:
        """Add what the first map makes of the good rows of `x`."""
        moments_kernels.transformed_moments(with_contiguous_rows(x), maps, self._sums, self._bad_rows, self.num_rows)
        self.num_rows += len(x)

    def read(self) -> tuple[NDArray[np.int64], int, tuple[int, int, int]]:
        """Return the sums, the number of rows and `(num_zero, num_nonfinite, first_bad)`; waits for the device."""
        return self._sums.cpu().numpy(), self.num_rows, read_bad_rows(self._bad_rows)

    def read_products(self) -> NDArray[np.float64] | None:
        """Return the sum of (u - pilot)(u - pilot)^T over the good rows, where asked for: the lower triangle."""
        return None if self._products is None else self._products.cpu().numpy()


def with_contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` `(n, dim)`, copied where the elements of a row do not lie side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
