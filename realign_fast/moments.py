"""Streaming count, mean, trace and covariance of unit rows.

Count, mean and trace are in fixed point: exact to merge, subtract and compare.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from . import _files
from ._dtypes import Rows, own
from ._errors import BadRowsError, raise_if_bad
from ._native import _C
from ._products import Products
from ._rows import as_rows, dtype_name, is_tensor, refuse_gradients
from .backends import check_has_kernels, choose, count_threads

if TYPE_CHECKING:
    from ._triton_rows import Accumulator

OnBadRows = Literal["raise", "skip", "zero"]
Precision = Literal["exact", "high", "fast"]

# One sum of 2**36 elements of magnitude 1 in units of 2**-27 is the largest that int64 holds.
_MAX_COUNT = 1 << (63 - _C.FIXED_POINT_BITS)
# Sums, how many rows are in them, and the bad ones among these.
_Found = tuple[NDArray[np.int64], int, tuple[int, int, int]]
_SHAPES = {"sums": (np.dtype(np.int64), 1)}
_MORE_SHAPES = {"products": (np.dtype(np.float64), 2), "pilot": (np.dtype(np.float64), 1)}
# A unit row, rounded, may be longer than 1 by a little.
_MAX_NORM = 1.001
# Whose mean is near enough to that of all rows to keep the digits of their products; and how far another may lie, in
# parts of the trace: the mean of 64 rows lies about so far.
_PILOT_ROWS = 4096
_FARTHEST_PILOT = 1 / 64
# Rows that a cache keeps are looked at before they are added, of more the products are kept until they are known to be
# good: either costs little.
_LOOK_FIRST_BYTES = 16 << 20


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
    covariance
        Collect it too, for the maps that need it: `dim**2` products a row, in the same read. It agrees to 1e-7
        (relative, Frobenius norm; of few rows, or the same ones again and again, 2e-7) whatever the order, chunking and
        merging; after a subtraction, to 1e-7 times the ratio of the rows before and after it (`MomentsWindow` keeps the
        parts, and so the digits).
    precision
        Of those products: "exact", float32 and added up in float64; "high", on a GPU at least three TF32 products each,
        else the same as "exact"; "fast", bfloat16 products with float32 sums, on a GPU and on processors with
        AVX512-BF16, elsewhere the same as "exact"; see `precision_error`.

    Attributes
    ----------
    dim : int
    precision : str
    """

    _max_count = _MAX_COUNT
    __slots__ = ("_count", "_num_skipped", "_num_zero", "_pending", "_products", "_sums", "dim", "precision")

    def __init__(self, dim: int, covariance: bool = False, precision: Precision = "high") -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
        self.dim = int(dim)
        self.precision: Precision = precision
        self._count = self._num_zero = self._num_skipped = 0
        self._sums: NDArray[np.int64] = np.zeros(self.dim, np.int64)
        self._products = Products(self.dim) if covariance else None
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
            self._update_on_cpu(as_rows(batch, name="batch", dim=self.dim), on_bad_rows, num_threads)
        return self

    def _update_on_cpu(self, rows: Rows, on_bad_rows: OnBadRows, num_threads: int | None) -> None:
        if self._products is None or on_bad_rows != "raise":
            return self.update_rows(rows, on_bad_rows, num_threads)
        # An error must leave the products as they were.
        if rows.values.nbytes <= _LOOK_FIRST_BYTES:
            bad = _C.find_bad_rows(rows.values, rows.bfloat16, count_threads(num_threads))
            raise_if_bad(bad, on_bad_rows, "batch")
            return self.update_rows(rows, on_bad_rows, num_threads)
        before = self._products.copy()
        try:
            self.update_rows(rows, on_bad_rows, num_threads)
        except BadRowsError:
            self._products = before
            raise

    def _update_on_gpu(self, batch: Any, on_bad_rows: OnBadRows) -> None:
        check_on_bad_rows(on_bad_rows)
        if not is_tensor(batch):
            raise TypeError(f"backend 'triton' takes torch tensors, got {type(batch).__name__}")
        if batch.ndim == 0 or batch.shape[-1] != self.dim:
            raise ValueError(f"batch must have rows of dimension {self.dim}, got shape {tuple(batch.shape)}")
        refuse_gradients(batch, "batch")
        rows = batch.detach().reshape(-1, self.dim)
        self._check_room(len(rows))
        if on_bad_rows == "raise":
            accumulator = self.new_accumulator(rows)
            accumulator.add(rows)
            self.add_accumulator(accumulator, on_bad_rows)
            return
        key = batch.device, on_bad_rows
        if key not in self._pending:
            self._pending[key] = self.new_accumulator(rows)
        self._pending[key].add(rows)

    def new_accumulator(self, rows: Any) -> Accumulator:
        """Return what adds up on the device of these rows `(n, dim)`; where there is no pilot, they give one."""
        from ._triton_rows import Accumulator

        products = self._products
        if products is None:
            return Accumulator(self.dim, rows.device)

        def look_at(num_rows: int) -> _Found:
            first = Accumulator(self.dim, rows.device)
            first.add(rows[:num_rows])
            return first.read()

        self._look_at_pilot(products, look_at)
        return Accumulator(self.dim, rows.device, products.pilot, self.precision)

    def add_accumulator(self, accumulator: Accumulator, on_bad_rows: OnBadRows) -> None:
        """Add what the `accumulator` has added up, bad rows as `on_bad_rows` says; waits for its device."""
        self.add_sums(*accumulator.read(), on_bad_rows)
        products = accumulator.read_products()
        if products is not None and self._products is not None:
            self._products.sums += products
            self._products.chosen = True

    def _settled(self) -> Moments:
        while self._pending:
            (_, on_bad_rows), accumulator = self._pending.popitem()
            self.add_accumulator(accumulator, on_bad_rows)
        return self

    def update_rows(
        self,
        rows: Rows,
        on_bad_rows: OnBadRows,
        num_threads: int | None = None,
        keys: NDArray[np.uint64] | None = None,
    ) -> None:
        """As `update`, for rows already seen as such; `keys` (n,) receives a hash of each row's content.

        With a covariance, what is left after an error is of no use.
        """
        check_on_bad_rows(on_bad_rows)
        self._check_room(len(rows.values))
        threads = count_threads(num_threads)
        sums = np.zeros_like(self._sums)
        products = self._products
        if products is None:
            bad = _C.moments(rows.values, rows.bfloat16, sums, keys, threads)
        else:

            def look_at(num_rows: int) -> _Found:
                first, of_first = rows.values[:num_rows], np.zeros_like(sums)
                return of_first, len(first), _C.moments(first, rows.bfloat16, of_first, None, threads)

            self._look_at_pilot(products, look_at)
            if self.precision == "fast" and products.error is None:
                products.error = _error_of_fast(rows, products.pilot, threads)
            arrays = rows.values, rows.bfloat16, products.pilot, sums, keys, products.sums
            bad = _C.covariance(*arrays, self._count, self.precision == "fast", threads)
        self.add_sums(sums, len(rows.values), bad, on_bad_rows)

    def _look_at_pilot(self, products: Products, look_at: Callable[[int], _Found]) -> None:
        """Take another pilot where that of the products lies far from the mean of all rows, or there is none.

        So a first batch that is small, empty or unlike the others costs no digits. `look_at(num_rows)` returns what is
        found in the first of those that come.
        """
        if self._pending:  # products about the same one lie on a GPU
            return
        sums, count = self._sums, self._count
        if count < _PILOT_ROWS:
            more, num_rows, bad = look_at(_PILOT_ROWS - count)
            sums, count = sums + more, count + num_rows - bad[0] - bad[1]
        if count == 0:
            return
        mean = _to_float(sums) / count
        distance, trace = np.square(mean - products.pilot).sum(), 1 - np.square(mean).sum()
        if self._count == 0 or distance > _FARTHEST_PILOT * trace:
            products.move_pilot(mean, self._count, _to_float(self._sums))

    def _check_room(self, num_rows: int) -> None:
        total = self._count + num_rows + sum(accumulator.num_rows for accumulator in self._pending.values())
        if total > self._max_count:
            raise OverflowError(f"Moments hold at most {self._max_count} rows, got {total}")

    def add_sums(
        self, sums: NDArray[np.int64], num_rows: int, bad: tuple[int, int, int], on_bad_rows: OnBadRows
    ) -> None:
        """Add what a kernel found in `num_rows` rows: their fixed-point `sums` `(dim,)` and the `bad` ones among them.

        What becomes of these, `on_bad_rows` says as in `update`.
        """
        raise_if_bad(bad, on_bad_rows, "batch")
        num_bad = bad[0] + bad[1]
        self._sums += sums
        if on_bad_rows == "zero" and self._products is not None:
            self._products.add_zeros(num_bad)  # the kernels left them out
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
        return _to_float(self._sums) / self.count

    @property
    def trace(self) -> float:
        """Trace of the covariance (ddof 0): mean squared norm minus squared norm of the mean, at least 0.

        Unit rows make it `1 - ||mean||**2` (design: no second pass). ValueError where no row was counted.
        """
        mean = self.mean
        return max(0.0, (self.count - self.num_zero) / self.count - float(mean @ mean))

    def _could_be(self) -> bool:
        """Return whether some set of rows has these counts and sums: no mean of unit rows is longer than 1."""
        good = self._count - self._num_zero
        return good >= 0 and float(np.linalg.norm(_to_float(self._sums))) <= _MAX_NORM * good

    @property
    def has_covariance(self) -> bool:
        """Whether the covariance is collected."""
        return self._products is not None

    @property
    def precision_error(self) -> float | None:
        """Of precision "fast" on the CPU: how far its products were from exact ones over the first 4,096 rows.

        Relative, in the Frobenius norm. Rounding averages out: over n rows expect `sqrt(4096 / n)` of it. None for
        another precision, before the first rows, and where a GPU has computed them.
        """
        return None if self._products is None else self._products.error

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Covariance of the unit rows (ddof 0), `(dim, dim)`.

        ValueError where no row was counted, or no covariance collected.
        """
        mean = self.mean
        if self._products is None:
            raise ValueError(
                "these Moments hold no covariance: collect them with Moments(dim, covariance=True), or on the command "
                "line with `realign stats --covariance`"
            )
        return self._products.covariance(self.count, mean)

    def merge(self, other: Moments) -> Moments:
        """Add the rows that `other` has seen, and return self.

        Raises
        ------
        ValueError
            If the dimensions differ, or one of both has collected a covariance and the other has not.
        """
        self._check_alike(other)
        self._check_room(other.count)
        mine, theirs = self._settled()._products, other._products
        if mine is not None and theirs is not None and theirs.chosen:
            if not mine.chosen:
                mine.choose_pilot(theirs.pilot)
            mine.sums += theirs.about(mine.pilot, other.count, _to_float(other._sums))
        self._count += other.count
        self._num_zero += other.num_zero
        self._num_skipped += other.num_skipped
        self._sums += other._sums
        return self

    def copy(self) -> Moments:
        """Return an independent copy."""
        return self._new().merge(self)

    @property
    def pilot(self) -> NDArray[np.float64] | None:
        """What products are computed about, `(dim,)`; None without a covariance, or as long as there are no rows."""
        products = self._settled()._products
        return products.pilot if products is not None and products.chosen else None

    def combined(self, add: Callable[[NDArray[Any]], NDArray[Any]], pilot: NDArray[np.float64] | None) -> Moments:
        """Return moments of what `add` makes of each of the sums, those of the products taken about `pilot`."""
        counts = np.array([self.count, self.num_zero, self.num_skipped])
        all_of_them = self._new()
        all_of_them._count, all_of_them._num_zero, all_of_them._num_skipped = (int(each) for each in add(counts))
        all_of_them._sums = add(self._sums)
        mine, theirs = self._products, all_of_them._products
        if mine is not None and theirs is not None and pilot is not None:
            theirs.choose_pilot(pilot)
            theirs.sums = add(np.tril(mine.about(pilot, self.count, _to_float(self._sums))))
        all_of_them._check_room(0)
        return all_of_them

    @classmethod
    def _of_size(cls, num_sums: int, covariance: bool) -> Moments:
        return cls(num_sums, covariance)

    def _new(self) -> Moments:
        return Moments(self.dim, self.has_covariance, self.precision)

    def __add__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        return self.copy().merge(other)

    def __sub__(self, part: Moments) -> Moments:
        if not isinstance(part, Moments):
            return NotImplemented
        self._check_alike(part)
        if part.count > self.count or part.num_zero > self.num_zero or part.num_skipped > self.num_skipped:
            raise ValueError(f"{part!r} is no part of {self!r}: it counts more rows")
        rest = self._new()
        rest._count = self.count - part.count
        rest._num_zero = self.num_zero - part.num_zero
        rest._num_skipped = self.num_skipped - part.num_skipped
        rest._sums = self._sums - part._sums
        if not rest._could_be():
            raise ValueError(f"{part!r} is no part of {self!r}: no unit rows have the sums that would be left")
        mine, theirs = self._products, part._products
        if rest._count and mine is not None and theirs is not None:
            rest._products = mine.copy()
            if theirs.chosen:
                rest._products.sums -= theirs.about(mine.pilot, part.count, _to_float(part._sums))
        return rest

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            (self.dim, self.count, self.num_zero, self.num_skipped)
            == (other.dim, other.count, other.num_zero, other.num_skipped)
        ) and (np.array_equal(self._sums, other._sums) and self._products == other._products)

    def __getstate__(self) -> object:
        return super(Moments, self._settled()).__getstate__()

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        for name, value in state[1].items():
            setattr(self, name, value)
        self._sums = own(self._sums)

    __hash__ = None  # type: ignore[assignment]  # a mutable value

    def __repr__(self) -> str:
        covariance = ", covariance=True" if self.has_covariance else ""
        return f"Moments(dim={self.dim}, count={self.count}{covariance})"

    def _check_alike(self, other: Moments) -> None:
        if self.dim != other.dim:
            raise ValueError(f"Moments of dimension {self.dim} and {other.dim} do not combine")
        if self.has_covariance != other.has_covariance:
            raise ValueError(
                f"Moments with and without a covariance do not combine: {self!r}, {other!r}; collect both with "
                "covariance=True (`realign stats --covariance`) or both without"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors, fields = self.state()
        _files.save(path, "moments", tensors, fields, version=1 if self._products is None else 2)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return the tensors and the fields of the header that a file of these moments holds."""
        fields: dict[str, Any] = {
            "count": self.count,
            "num_zero": self.num_zero,
            "num_skipped": self.num_skipped,
            "fixed_point_bits": _C.FIXED_POINT_BITS,
        }
        tensors: dict[str, NDArray[Any]] = {"sums": self._sums}
        if self._products is None:
            return tensors, fields
        tensors |= {"pilot": self._products.pilot, "products": np.tril(self._products.sums)}
        return tensors, fields | {"precision": self.precision}

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
        return cls.of_state(path, *_files.load(path, "moments", _SHAPES, optional=_MORE_SHAPES))

    @classmethod
    def of_state(cls, path: object, tensors: Mapping[str, NDArray[Any]], fields: Mapping[str, Any]) -> Moments:
        """Return the moments of which `state` gave these `tensors` and `fields`.

        ValueError, naming `path`, where no moments have them.
        """
        counts: dict[str, int] = {}
        for name in ("count", "num_zero", "num_skipped"):
            value = fields.get(name)
            if type(value) is not int or not 0 <= value <= _MAX_COUNT:
                raise ValueError(f"{path}: {name} must be a count, got {value!r}")
            counts[name] = value
        if fields.get("fixed_point_bits") != _C.FIXED_POINT_BITS:
            raise ValueError(f"{path}: sums in units this package does not know")
        sums = tensors["sums"]
        if sums.size == 0:
            raise ValueError(f"{path}: sums and counts do not fit together")
        moments = cls._of_size(sums.size, "products" in tensors)
        moments._count, moments._num_zero, moments._num_skipped = counts.values()
        moments._sums = sums.copy()  # what is updated is no one else's
        if not moments._could_be():
            raise ValueError(f"{path}: sums and counts do not fit together")
        if moments._products is not None:
            moments._load_products(path, moments._products, tensors, fields)
        return moments

    def _load_products(
        self, path: object, products: Products, tensors: Mapping[str, NDArray[Any]], fields: Mapping[str, Any]
    ) -> None:
        sums, pilot = tensors["products"], tensors.get("pilot", np.zeros(0))
        if sums.shape != (self.dim, self.dim) or pilot.shape != (self.dim,):
            raise ValueError(
                f"{path}: products and pilot must have shapes ({self.dim}, {self.dim}) and ({self.dim},), "
                f"got {sums.shape} and {pilot.shape}"
            )
        if fields.get("precision") not in get_args(Precision):
            raise ValueError(f"{path}: precision must be one of {', '.join(get_args(Precision))}")
        self.precision = fields["precision"]
        if self._count == 0:
            return
        products.choose_pilot(pilot)
        products.sums = np.ascontiguousarray(sums)
        trace = float(np.trace(self.covariance))
        if not abs(trace - self.trace) < 1e-3:
            raise ValueError(f"{path}: products and sums do not fit together: traces {trace:.6g} and {self.trace:.6g}")


class MappedMoments(Moments):
    """What adds up, over batches and processes, to the moments of mapped rows: `finished` makes these of it.

    A mapped row is `a u + b shift + c correction`, and the vectors are the same for all. So the sums are those of the
    `a u` and, behind them, of `b` and `c`, which `dim` counts too: the vectors are added when all rows are in.
    """

    _max_count = _MAX_COUNT // 2  # a part may be twice as long as its row
    __slots__ = ()

    def __init__(self, dim: int) -> None:
        super().__init__(dim + _C.NUM_FACTORS)

    def update_mapped(
        self,
        rows: Rows,
        affine: _C.AffineMap | None,
        row_map: _C.RowMap,
        on_bad_rows: OnBadRows,
        num_threads: int | None = None,
    ) -> None:
        """Add what `affine`, if any, and then `row_map` make of each of the `rows`, without writing it anywhere.

        `on_bad_rows` and `num_threads` as in `update`.
        """
        check_on_bad_rows(on_bad_rows)
        self._check_room(len(rows.values))
        sums = np.zeros_like(self._sums)
        threads = count_threads(num_threads)
        if affine is None:
            bad = _C.transformed_moments(rows.values, rows.bfloat16, row_map, sums, threads)
        else:
            bad = _C.affine_moments(rows.values, rows.bfloat16, affine, row_map, sums, threads)
        self.add_sums(sums, len(rows.values), bad, on_bad_rows)

    def finished(self, row_map: _C.RowMap) -> Moments:
        """Return the moments of the mapped rows."""
        moments = Moments(row_map.dim)
        moments._count, moments._num_zero, moments._num_skipped = self._count, self._num_zero, self._num_skipped
        row_map.add_up(self._sums, moments._sums)
        return moments

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """As that of `Moments`, marked."""
        tensors, fields = super().state()
        return tensors, fields | {"mapped": True}

    @classmethod
    def _of_size(cls, num_sums: int, covariance: bool) -> MappedMoments:
        if covariance:
            raise ValueError("products of mapped rows")
        return cls(num_sums - _C.NUM_FACTORS)

    def _new(self) -> MappedMoments:
        return self._of_size(self.dim, False)

    def _could_be(self) -> bool:
        return self._num_zero <= self._count  # parts of a row may be longer than it


def _error_of_fast(rows: Rows, pilot: NDArray[np.float64], threads: int) -> float | None:
    """Return how far fast products are from exact ones (Frobenius norm, relative), over some rows; None of none."""
    if not _C.has_fast_products():
        return 0.0
    some, dim = rows.values[:_PILOT_ROWS], len(pilot)
    exact, fast = np.zeros((dim, dim)), np.zeros((dim, dim))
    for products, is_fast in ((exact, False), (fast, True)):
        sums = np.zeros(dim, np.int64)
        _C.covariance(some, rows.bfloat16, pilot, sums, None, products, len(some), is_fast, threads)
    norm = _norm_of_lower(exact)
    return _norm_of_lower(fast - exact) / norm if norm else None


def _norm_of_lower(matrix: NDArray[np.float64]) -> float:
    """Return the Frobenius norm of a symmetric matrix, zeros above its diagonal.

    Without BLAS: its threads would go on spinning beside the kernels for longer than these take.
    """
    diagonal = np.square(matrix.diagonal()).sum()
    return float(np.sqrt(2 * np.square(matrix).sum() - diagonal))


def _to_float(sums: NDArray[np.int64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.ldexp(sums.astype(np.float64), -_C.FIXED_POINT_BITS)
    return values
