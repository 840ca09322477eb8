"""The map as a layer: gradients, `torch.compile`, `torch.export`, CUDA graphs.

Source: ReAlign (arXiv 2602.07026), Anchor, Trace and Centroid alignment; the gradient is that of the fused map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ImportError("realign_fast.nn needs torch: pip install 'realign-fast[torch]'") from missing

from ._dtypes import DTYPES
from ._ops import transform
from ._rows import dtype_name
from .alignment import Alignment, Side

__all__ = ["ReAlign"]

_DTYPES = frozenset(getattr(torch, name) for name in DTYPES)
_EXACT = ("scale", "shift", "correction")
_AFFINE = ("matrix", "centre", "offset")


class ReAlign(torch.nn.Module):
    """Maps rows `(..., dim)` as `Alignment.transform` does, and passes gradients through to them.

    It has nothing to train. Rows are float16, bfloat16, float32 or float64, in any layout, and the arithmetic is
    float32 or better whatever they are, also under autocast; CPU tensors go through the C++ kernels, tensors on a CUDA
    or ROCm device through Triton where that can run, and others through plain torch. Nothing waits for the device: rows
    with NaN, infinity or norm zero become zeros, have gradient zero, and are counted.

    Parameters
    ----------
    alignment
        A fitted one.
    side
        "source" maps text; "target" brings image rows to unit length, or maps them too, as `Alignment.transform`.
    dtype
        Of the result; by default that of the rows.
    noise_std
        Standard deviation of an element of Gaussian noise that is added while training, and then the rows projected to
        unit length; by default that of the map, 0 but for "c3". It comes from torch's own generator.

    Attributes
    ----------
    scale, shift, correction : torch.Tensor
        Buffers of float64, `(1,)`, `(1, dim)` and `(1, dim)`, in `state_dict`; with a matrix, 1 and zeros but for the
        correction, and beside them `matrix`, `centre` and `offset`. They keep that dtype under `.half()`,
        `.to(torch.bfloat16)` and engines that cast a model; where a device has no float64, they stay on the CPU.
    bad_rows : torch.Tensor
        `(2,)` int64: how many rows of norm zero and how many with NaN or infinity came since `raise_bad_rows`. Rows
        that activation checkpointing computes again count again.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    correction: torch.Tensor
    _correction32: torch.Tensor
    bad_rows: torch.Tensor

    def __init__(
        self,
        alignment: Alignment,
        *,
        side: Side = "source",
        dtype: torch.dtype | None = None,
        noise_std: float | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None:
            dtype_name(dtype)
        self.dim = alignment.dim
        self.dtype = dtype
        parameters = alignment.parameters_of(side)
        self.noise_std = parameters.noise_std if noise_std is None else noise_std
        maps = parameters.alone.on(torch.device("cpu"))
        for name in _EXACT:
            self.register_buffer(name, getattr(maps, f"{name}64").clone())
            # What the kernels read; follows from the above.
            self.register_buffer(f"_{name}32", getattr(maps, name).clone(), persistent=False)
        self.has_matrix = parameters.affine is not None
        if parameters.affine is not None:
            step = parameters.affine
            for name, values in zip(_AFFINE, (step.matrix, step.centre, step.centred_offset), strict=True):
                self.register_buffer(name, torch.tensor(values, dtype=torch.float64))
                self.register_buffer(f"_{name}32", torch.tensor(values, dtype=torch.float32), persistent=False)
        self.register_buffer("bad_rows", torch.zeros(2, dtype=torch.int64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map rows.

        Parameters
        ----------
        x
            `(..., dim)`, on the device of the layer.

        Raises
        ------
        TypeError, ValueError
            If `x` has another dtype, dimension or device.
        """
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have rows of dimension {self.dim}, got shape {tuple(x.shape)}")
        if x.device != self.bad_rows.device:
            raise ValueError(f"x is on {x.device}, the layer on {self.bad_rows.device}: bring them together with .to()")
        if x.dtype not in _DTYPES:
            dtype_name(x.dtype, name="x.dtype")  # says what is wrong
        if self.shift.dtype != torch.float64:
            raise TypeError(f"shift must stay float64, got {self.shift.dtype}: something cast this layer's buffers")
        dtype = x.dtype if self.dtype is None else self.dtype
        wide = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
        noisy = self.training and self.noise_std > 0
        if self.has_matrix:
            unit, bad = self._project_twice(x, wide, corrected=False)
            out, _ = self._project_twice(self._move(unit), wide if noisy else dtype)
        else:
            out, bad = self._project_twice(x, wide if noisy else dtype)
        self.bad_rows.add_(bad)
        return self._add_noise(out).to(dtype) if noisy else out

    def _project_twice(
        self, x: torch.Tensor, dtype: torch.dtype, *, corrected: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `pi(pi(scale u + shift) + correction)`, or without the correction, and how many rows were bad."""
        correction32, correction = self._correction32, self.correction
        if not corrected:
            correction32, correction = torch.zeros_like(correction32), torch.zeros_like(correction)
        out, bad = transform(
            x, self._scale32, self._shift32, correction32, self.scale, self.shift, correction, dtype
        )  # fmt: skip
        return out, bad

    def _move(self, unit: torch.Tensor) -> torch.Tensor:
        """Return `matrix unit + offset`; zeros, which stand for bad rows, stay zeros."""
        names = _AFFINE if unit.dtype == torch.float64 else (f"_{name}32" for name in _AFFINE)
        matrix, centre, offset = (getattr(self, name) for name in names)
        with torch.autocast(unit.device.type, enabled=False):
            moved = torch.nn.functional.linear(unit - centre, matrix, offset)
        return torch.where((unit != 0).any(dim=-1, keepdim=True), moved, 0)

    def _add_noise(self, rows: torch.Tensor) -> torch.Tensor:
        noisy = torch.nn.functional.normalize(rows + self.noise_std * torch.randn_like(rows), dim=-1)
        return torch.where((rows != 0).any(dim=-1, keepdim=True), noisy, 0)

    def raise_bad_rows(self) -> None:
        """Raise if bad rows have come since the last call, and count from zero again; waits for the device.

        Raises
        ------
        ValueError
            Saying how many of each kind.
        """
        num_zero, num_nonfinite = self.bad_rows.tolist()
        self.bad_rows.zero_()
        if num_zero or num_nonfinite:
            raise ValueError(
                f"x had bad rows, which became zeros: {num_nonfinite} with NaN or infinity, {num_zero} of norm zero"
            )

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"dim={self.dim}" + ("" if self.dtype is None else f", dtype={self.dtype}")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ReAlign:
        # Casts to a lower precision pass by here too: buffers follow them to another device, not to another dtype.
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            try:
                moved = fn(buffer)
            except TypeError:
                if buffer.dtype != torch.float64:
                    raise
                moved = buffer.cpu()  # the device has no float64
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        for name in (*_EXACT, *(_AFFINE if self.has_matrix else ())):
            exact = getattr(self, name).double()
            setattr(self, name, exact)
            setattr(self, f"_{name}32", exact.float().to(self.bad_rows.device))
