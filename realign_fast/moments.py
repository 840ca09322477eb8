"""Streaming count, mean and trace of unit rows, in fixed point: exact to merge, subtract and compare."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _C, _files
from ._dtypes import Rows
from ._errors import BadRowsError
from ._rows import as_rows, dtype_name, is_tensor, refuse_gradients
from .backends import check_has_kernels, choose, count_threads

if TYPE_CHECKING:
    from ._triton_rows import Accumulator

OnBadRows = Literal["raise", "skip", "zero"]

# One sum of 2**36 elements of magnitude 1 in units of 2**-27 is the largest that int64 holds.
_MAX_COUNT = 1 << (63 - _C.FIXED_POINT_BITS)


def check_on_bad_rows(policy: str, *, skip: bool = True) -> None:
    """Raise ValueError unless `policy` is "raise", "zero" or, where rows may be left out, "skip"."""
    allowed = ("raise", "skip", "zero") if skip else ("raise", "zero")
    if policy not in allowed:
        raise ValueError(f"on_bad_rows must be one of {', '.join(allowed)}, got {policy!r}")


class Moments:
    """Statistics of a set of embeddings, each normalised to length one.

    An accumulator and a value: `update` adds rows, `merge`, `+` and `-` combine sets, `==` compares them, and pickle,
    copy and `save` keep them. Sums are integers in units of 2**-27, so that the same rows give the same bits in any
    order, chunking, number of threads or tree of merges (on one instruction set). Each element of the mean lies
    within about 1e-9 + 8e-8 / sqrt(count) of the exact one.

    Parameters
    ----------
    dim
        Dimension of the rows, at least 1.

    Attributes
    ----------
    dim : int
    """

    __slots__ = ("_count", "_num_skipped", "_num_zero", "_pending", "_sums", "dim")

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = int(dim)
        self._count = self._num_zero = self._num_skipped = 0
        self._sums: NDArray[np.int64] = np.zeros(self.dim, np.int64)
        # What still lies on GPUs, by device and what becomes of bad rows there.
        self._pending: dict[tuple[Any, OnBadRows], Accumulator] = {}

    @property
    def count(self) -> int:
        """Rows counted, rows of norm zero among them where they were let in."""
        return self._settled()._count

    @property
    def num_zero(self) -> int:
        """Counted rows that add nothing to the sums (bad rows under `on_bad_rows="zero"`)."""
        return self._settled()._num_zero

    @property
    def num_skipped(self) -> int:
        """Bad rows left out under `on_bad_rows="skip"`."""
        return self._settled()._num_skipped

    def update(
        self,
        batch: object,
        *,
        on_bad_rows: OnBadRows = "raise",
        num_threads: int | None = None,
        backend: str = "auto",
    ) -> Moments:
        """Add the rows of `batch`, of shape `(..., dim)`, and return self.

        Parameters
        ----------
        batch
            NumPy array or torch tensor of float16, bfloat16, float32 or float64.
        on_bad_rows
            What becomes of rows with NaN, infinity or norm zero: "raise" leaves the moments as they were and raises,
            "skip" leaves the rows out, "zero" counts them as zero vectors.
        num_threads
            At most so many; by default the cores this process may use.
        backend
            "auto"; or "cpu", the C++ kernels; or "triton", the GPU kernels. A tensor on a GPU goes through Triton where
            that can run, and else through host memory. Under "skip" and "zero" nothing then waits for the GPU: its sums
            are fetched when something reads these moments.

        Raises
        ------
        BadRowsError
            A ValueError: under "raise", naming the first bad row.
        TypeError, ValueError
            If `batch` has another dtype or dimension, or the backend cannot run where it lies.
        """
        check_has_kernels(backend, "moments")
        device = str(batch.device) if is_tensor(batch) and not batch.is_cpu else "cpu"
        if choose(backend, device, (dtype_name(batch.dtype),) if is_tensor(batch) else ()) == "triton":
            self._update_on_gpu(batch, on_bad_rows)
        else:
            self.update_rows(as_rows(batch, name="batch", dim=self.dim), on_bad_rows, num_threads)
        return self

    def _update_on_gpu(self, batch: Any, on_bad_rows: OnBadRows) -> None:
        check_on_bad_rows(on_bad_rows)
        if not is_tensor(batch):
            raise TypeError(f"backend 'triton' takes torch tensors, got {type(batch).__name__}")
        if batch.ndim == 0 or batch.shape[-1] != self.dim:
            raise ValueError(f"batch must have rows of dimension {self.dim}, got shape {tuple(batch.shape)}")
        refuse_gradients(batch, "batch")
        from ._triton_rows import Accumulator

        rows = batch.detach().reshape(-1, self.dim)
        self._check_room(len(rows))
        if on_bad_rows == "raise":
            accumulator = Accumulator(self.dim, batch.device)
            accumulator.add(rows)
            self.add_sums(*accumulator.read(), on_bad_rows)
            return
        key = batch.device, on_bad_rows
        if key not in self._pending:
            self._pending[key] = Accumulator(self.dim, batch.device)
        self._pending[key].add(rows)

    def _settled(self) -> Moments:
        while self._pending:
            (_, on_bad_rows), accumulator = self._pending.popitem()
            self.add_sums(*accumulator.read(), on_bad_rows)
        return self

    def update_rows(
        self,
        rows: Rows,
        on_bad_rows: OnBadRows,
        num_threads: int | None = None,
        keys: NDArray[np.uint64] | None = None,
    ) -> None:
        """As `update`, for rows already seen as such; `keys` (n,) receives a hash of each row's content."""
        check_on_bad_rows(on_bad_rows)
        self._check_room(len(rows.values))
        sums = np.zeros_like(self._sums)
        bad = _C.moments(rows.values, rows.bfloat16, sums, keys, count_threads(num_threads))
        self.add_sums(sums, len(rows.values), bad, on_bad_rows)

    def update_transformed(
        self,
        rows: Rows,
        row_map: _C.RowMap,
        on_bad_rows: OnBadRows,
        num_threads: int | None = None,
    ) -> None:
        """Add what `row_map` makes of each row, without writing it anywhere."""
        check_on_bad_rows(on_bad_rows)
        self._check_room(len(rows.values))
        sums = np.zeros_like(self._sums)
        bad = _C.transformed_moments(rows.values, rows.bfloat16, row_map, sums, count_threads(num_threads))
        self.add_sums(sums, len(rows.values), bad, on_bad_rows)

    def _check_room(self, num_rows: int) -> None:
        total = self._count + num_rows + sum(accumulator.num_rows for accumulator in self._pending.values())
        if total > _MAX_COUNT:
            raise OverflowError(f"Moments hold at most {_MAX_COUNT} rows, got {total}")

    def add_sums(
        self, sums: NDArray[np.int64], num_rows: int, bad: tuple[int, int, int], on_bad_rows: OnBadRows
    ) -> None:
        """Add what a kernel found in `num_rows` rows: their fixed-point sums `(dim,)` and the bad ones among them."""
        num_zero, num_nonfinite, first = bad
        num_bad = num_zero + num_nonfinite
        if num_bad and on_bad_rows == "raise":
            raise BadRowsError("batch", first, num_zero, num_nonfinite)
        self._sums += sums
        if on_bad_rows == "skip":
            self._count += num_rows - num_bad
            self._num_skipped += num_bad
        else:
            self._count += num_rows
            self._num_zero += num_bad

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of the unit rows, `(dim,)`. ValueError where no row was counted."""
        if self.count == 0:
            raise ValueError("the mean of no rows is not defined: update Moments first")
        return np.ldexp(self._sums.astype(np.float64), -_C.FIXED_POINT_BITS) / self.count

    @property
    def trace(self) -> float:
        """Trace of the covariance (ddof 0): mean squared norm minus squared norm of the mean, at least 0.

        Unit rows make it `1 - ||mean||**2` (design: no second pass). ValueError where no row was counted.
        """
        mean = self.mean
        return max(0.0, (self.count - self.num_zero) / self.count - float(mean @ mean))

    def merge(self, other: Moments) -> Moments:
        """Add the rows that `other` has seen, and return self."""
        self._check_dim(other)
        self._check_room(other.count)
        self._count += other.count
        self._num_zero += other.num_zero
        self._num_skipped += other.num_skipped
        self._sums += other._sums
        return self

    def copy(self) -> Moments:
        """Return an independent copy."""
        return Moments(self.dim).merge(self)

    def __add__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        return self.copy().merge(other)

    def __sub__(self, part: Moments) -> Moments:
        if not isinstance(part, Moments):
            return NotImplemented
        self._check_dim(part)
        if part.count > self.count or part.num_zero > self.num_zero or part.num_skipped > self.num_skipped:
            raise ValueError(f"{part!r} is no part of {self!r}: it counts more rows")
        rest = Moments(self.dim)
        rest._count = self.count - part.count
        rest._num_zero = self.num_zero - part.num_zero
        rest._num_skipped = self.num_skipped - part.num_skipped
        rest._sums = self._sums - part._sums
        return rest

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            (self.dim, self.count, self.num_zero, self.num_skipped)
            == (other.dim, other.count, other.num_zero, other.num_skipped)
        ) and bool((self._sums == other._sums).all())

    def __getstate__(self) -> object:
        return super(Moments, self._settled()).__getstate__()

    __hash__ = None  # type: ignore[assignment]  # a mutable value

    def __repr__(self) -> str:
        return f"Moments(dim={self.dim}, count={self.count})"

    def _check_dim(self, other: Moments) -> None:
        if self.dim != other.dim:
            raise ValueError(f"Moments of dimension {self.dim} and {other.dim} do not combine")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        fields: dict[str, Any] = {
            "count": self.count,
            "num_zero": self.num_zero,
            "num_skipped": self.num_skipped,
            "fixed_point_bits": _C.FIXED_POINT_BITS,
        }
        _files.save(path, "moments", {"sums": self._sums}, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read what `save` wrote.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it is damaged, holds something else, or comes from a newer format.
        """
        tensors, fields = _files.load(path, "moments", {"sums": (np.dtype(np.int64), 1)})
        counts: dict[str, int] = {}
        for name in ("count", "num_zero", "num_skipped"):
            value = fields.get(name)
            if type(value) is not int or not 0 <= value <= _MAX_COUNT:
                raise ValueError(f"{path}: {name} must be a count, got {value!r}")
            counts[name] = value
        if fields.get("fixed_point_bits") != _C.FIXED_POINT_BITS:
            raise ValueError(f"{path}: sums in units this package does not know")
        sums = tensors["sums"]
        # A rounded unit row may pass 1 by a little.
        limit = 1.001 * counts["count"] * 2.0**_C.FIXED_POINT_BITS
        if sums.size == 0 or counts["num_zero"] > counts["count"] or (np.abs(sums.astype(np.float64)) > limit).any():
            raise ValueError(f"{path}: sums and counts do not fit together")
        moments = cls(sums.size)
        moments._count, moments._num_zero, moments._num_skipped = counts.values()
        moments._sums = np.ascontiguousarray(sums)
        return moments
