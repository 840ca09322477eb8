"""What `_C` does, in NumPy and float64, for where the extension could not be built.

`_C.pyi` says what each function is. Chunk by chunk, so that memory does not grow with the rows. `num_threads` is
checked and not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import reference
from ._dtypes import Rows, from_float64, to_float64
from ._os import pread
from ._plain_hash import XXH64 as XXH64
from ._plain_pickle import scan_pickle as scan_pickle

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
BadRows = tuple[int, int, int]

FIXED_POINT_BITS = 27
NUM_FACTORS = 2

_CHUNK_ELEMENTS = 1 << 19
_READ_BYTES = 16 << 20


# ---- What is handed in -----------------------------------------------------------------------------------------------


def _rows(values: NDArray[Any], bfloat16: bool, name: str = "rows") -> Rows:
    fits = values.dtype == np.uint16 if bfloat16 else values.dtype.kind == "f" and values.dtype.itemsize <= 8
    if not fits or not values.dtype.isnative:
        expected = "uint16 holding bfloat16" if bfloat16 else "float16, float32 or float64 in native byte order"
        raise TypeError(f"{name} must be {expected}, got {values.dtype}")
    if values.ndim != 2 or values.shape[1] < 1:
        raise ValueError(f"{name} must have shape (n, dim) with dim of at least 1, got {values.shape}")
    if values.shape[1] > 1 and len(values) and values.strides[1] != values.itemsize:
        raise ValueError(f"{name} must have a contiguous last axis, got a stride of {values.strides[1]} bytes")
    return Rows(values, "bfloat16" if bfloat16 else values.dtype.name)


def _array(values: NDArray[Any], dtype: type, shape: tuple[int, ...], name: str, writeable: bool = False) -> None:
    if values.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype)}, got {values.dtype}")
    if values.shape != shape or not values.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous of shape {shape}, got {values.shape}")
    if writeable:
        _check_writeable(values, name)


def _check_writeable(values: NDArray[Any], name: str) -> None:
    if not values.flags.writeable:
        raise ValueError(f"{name} must be writeable")


def _check_threads(num_threads: int) -> None:
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")


def _check_dim(rows: Rows, dim: int, of: str) -> None:
    if rows.values.shape[1] != dim:
        raise ValueError(f"rows must have the dimension of {of}, {dim}, got shape {rows.values.shape}")


def _out_rows(values: NDArray[Any], bfloat16: bool, rows: Rows, dim: int) -> Rows:
    """Return where rows of that dimension are written to, given those that are read."""
    out = _rows(values, bfloat16, "out")
    _check_writeable(values, "out")
    if values.shape != (len(rows.values), dim):
        raise ValueError(f"out must have shape {(len(rows.values), dim)}, got {values.shape}")
    if len(values) > 1 and abs(values.strides[0]) < dim * values.itemsize:
        raise ValueError("out must not have rows that overlap")
    places = [(x.ctypes.data, x.strides[0], x.shape[1], x.itemsize) for x in (values, rows.values)]
    if places[0] != places[1] and np.may_share_memory(values, rows.values):
        raise ValueError("out must be rows themselves or not overlap them")
    return out


def _bytes(data: Any, name: str, writeable: bool = False) -> NDArray[np.uint8]:
    try:
        values = np.frombuffer(data, np.uint8)
    except (BufferError, TypeError, ValueError):
        values = None
    if values is None or (writeable and not values.flags.writeable):
        raise TypeError(f"{name} must be a contiguous {'writeable ' * writeable}buffer")
    return values


# ---- Maps ------------------------------------------------------------------------------------------------------------


def _exponent_of(x: float) -> int:
    """Return the least of 0, 1, 2 and so on whose power of 2 is not below x."""
    mantissa, exponent = math.frexp(min(max(x, 1.0), 2.0**500))
    return exponent - (mantissa == 0.5)


class RowMap:
    """The map `pi(pi(scale * u + shift) + correction)` of unit rows `u = pi(row)`."""

    def __init__(self, scale: float, shift: Vector, correction: Vector) -> None:
        if not np.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        if shift.ndim != 1:
            raise ValueError(f"shift must have shape (dim,), got {shift.shape}")
        _array(shift, np.float64, shift.shape, "shift")
        _array(correction, np.float64, shift.shape, "correction")
        self._parameters = float(scale), shift.copy(), correction.copy()
        self.dim = len(shift)
        # As the kernels count, so that either can go on with the sums of the other.
        lengths = math.sqrt(shift @ shift), math.sqrt(correction @ correction)
        distance = abs(abs(scale) - lengths[0])
        longest = abs(scale) * min(2.0, 1 / distance if distance else 2.0)
        self.sum_bits = FIXED_POINT_BITS - _exponent_of(min(longest / 2, 2.0**16))
        self._vector_bits = [self.sum_bits - 3 + _exponent_of(length) for length in lengths]

    def add_up(self, mapped: NDArray[np.int64], sums: NDArray[np.int64]) -> None:
        _array(mapped, np.int64, (self.dim + NUM_FACTORS,), "mapped")
        _array(sums, np.int64, (self.dim,), "sums", True)
        rows = np.ldexp(mapped[: self.dim].astype(np.float64), -self.sum_bits)
        factors = [math.ldexp(each, -bits) for each, bits in zip(mapped[self.dim :], self._vector_bits, strict=True)]
        rows += factors[0] * self._parameters[1] + factors[1] * self._parameters[2]
        sums += np.rint(np.ldexp(rows, FIXED_POINT_BITS)).astype(np.int64)

    def apply(self, rows: Matrix) -> Matrix:
        """Map `(n, dim)` rows; zeros for bad ones."""
        return reference.row_transform(rows, *self._parameters)

    def backward(self, rows: Matrix, grad: Matrix) -> Matrix:
        """Return the gradient with respect to `(n, dim)` rows; zeros for bad ones."""
        return reference.row_transform_backward(rows, grad, *self._parameters)


class AffineMap:
    """`matrix (u - centre) + offset` of unit rows `u = pi(row)`."""

    def __init__(self, matrix: Matrix, centre: Vector, offset: Vector) -> None:
        if matrix.ndim != 2 or not 1 <= matrix.shape[0] <= matrix.shape[1]:
            raise ValueError(f"matrix must have shape (out_dim, dim) with out_dim from 1 to dim, got {matrix.shape}")
        self.out_dim, self.dim = matrix.shape
        _array(matrix, np.float64, matrix.shape, "matrix")
        _array(centre, np.float64, (self.dim,), "centre")
        _array(offset, np.float64, (self.out_dim,), "offset")
        self._parameters = matrix.copy(), centre.copy(), offset.copy()

    def apply(self, rows: Matrix) -> Matrix:
        """Map `(n, dim)` rows; zeros for bad ones."""
        matrix, centre, offset = self._parameters
        return np.where(reference.bad_rows(rows)[:, None], 0.0, reference.whiten(rows, matrix, centre) + offset)


# ---- Rows, chunk by chunk --------------------------------------------------------------------------------------------


def _chunks(rows: Rows) -> Iterator[tuple[slice, Matrix]]:
    """Return rows as float64, in C order whatever their strides: sums along a row are then taken in one order."""
    step = max(1, _CHUNK_ELEMENTS // rows.values.shape[1])
    for start in range(0, len(rows.values), step):
        part = slice(start, start + step)
        with np.errstate(invalid="ignore"):  # a signalling NaN is a bad row as any other
            values = np.ascontiguousarray(to_float64(Rows(rows.values[part], rows.dtype)))
        yield part, values


class _Bad:
    """Counts bad rows."""

    def __init__(self) -> None:
        self.found: BadRows = (0, 0, -1)

    def among(self, rows: Matrix, part: slice) -> NDArray[np.bool_]:
        """Return `(n,)`: which rows are bad; count them."""
        bad = reference.bad_rows(rows)
        if bad.any():
            num_zero, num_nonfinite, first = self.found
            zero = int((rows[bad] == 0).all(axis=1).sum())
            first = part.start + int(bad.argmax()) if first < 0 else first
            self.found = num_zero + zero, num_nonfinite + int(bad.sum()) - zero, first
        return bad


def _write(rows: Rows, out: Rows, make: Callable[[Matrix, slice], Matrix]) -> BadRows:
    """Write what `make` makes of the rows of each chunk."""
    bad = _Bad()
    for part, values in _chunks(rows):
        bad.among(values, part)
        from_float64(make(values, part), Rows(out.values[part], out.dtype))
    return bad.found


def _add_mapped(rows: Rows, sums: NDArray[np.int64], row_map: RowMap, make: Callable[[Matrix], Matrix]) -> BadRows:
    """Add what `make`, and then the map, make of the good rows to `sums`."""
    bad = _Bad()
    for part, values in _chunks(rows):
        _add(row_map.apply(make(values[~bad.among(values, part)])), sums, row_map.sum_bits)
    return bad.found


def _add(rows: Matrix, sums: NDArray[np.int64], bits: int = FIXED_POINT_BITS) -> None:
    """Add rows, rounded to fixed point, to `sums`."""
    sums += np.rint(np.ldexp(rows, bits)).astype(np.int64).sum(axis=0)


# ---- Moments ---------------------------------------------------------------------------------------------------------


def _unit_rows(rows: Matrix) -> Matrix:
    """Return `pi(row)` of good rows, operation by operation as the kernels for float64, so that bits are the same."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    extreme = (largest < 1e-140) | (largest > 1e140)
    step = np.where(extreme, np.where(largest < 1, 2.0**500, 2.0**-500), 1.0)
    rows = rows * step / np.where(extreme, largest * step, 1.0)
    num_rows, dim = rows.shape
    steps = -(-dim // 8)
    squares = np.zeros((num_rows, 8 * steps))
    squares[:, :dim] = rows**2
    # One after the other, which a sum does not promise.
    lanes = np.add.accumulate(squares.reshape(num_rows, steps, 8), axis=1)[:, -1]
    pairs = lanes[:, :4] + lanes[:, 4:]
    total = (pairs[:, 0] + pairs[:, 1]) + (pairs[:, 2] + pairs[:, 3])
    unit: Matrix = rows * (1 / np.sqrt(total))[:, None]
    return unit


_U64 = np.uint64  # a number of Python would make an array of int64 of another


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def _keys_of(unit: Matrix) -> NDArray[np.uint64]:
    """Return a hash of each unit row, of rows of float64 that of the kernels."""
    words = _mix(np.arange(1, unit.shape[1] + 1, dtype=np.uint64) * _U64(0x9E3779B97F4A7C15))
    magnitudes = np.float32(0.5) + np.float32(0.5) * (words >> _U64(40)).astype(np.float32) * np.float32(2**-24)
    direction = np.where(words & _U64(1), magnitudes, -magnitudes).astype(np.float64)
    projected = np.add.accumulate(unit * direction, axis=1)[:, -1].copy()
    return np.maximum(_mix(projected.view(np.uint64)), 1)


def _unit_chunks(
    rows: NDArray[Any], bfloat16: bool, sums: NDArray[np.int64], keys: NDArray[np.uint64] | None, bad: _Bad
) -> Iterator[Matrix]:
    """Return the unit rows of the good ones, when they are in `sums` and their keys in `keys`."""
    of = _rows(rows, bfloat16)
    _array(sums, np.int64, (rows.shape[1],), "sums", True)
    if keys is not None:
        _array(keys, np.uint64, (len(rows),), "keys", True)
    for part, values in _chunks(of):
        is_bad = bad.among(values, part)
        unit = _unit_rows(values[~is_bad])
        _add(unit, sums)
        if keys is not None:
            keys[part] = 0
            keys[part][~is_bad] = _keys_of(unit)
        yield unit


def moments(
    rows: NDArray[Any], bfloat16: bool, sums: NDArray[np.int64], keys: NDArray[np.uint64] | None, num_threads: int
) -> BadRows:
    _check_threads(num_threads)
    bad = _Bad()
    for _ in _unit_chunks(rows, bfloat16, sums, keys, bad):
        pass
    return bad.found


def covariance(
    rows: NDArray[Any],
    bfloat16: bool,
    pilot: Vector,
    sums: NDArray[np.int64],
    keys: NDArray[np.uint64] | None,
    products: Matrix,
    num_seen: int,
    fast: bool,
    num_threads: int,
) -> BadRows:
    _check_threads(num_threads)
    dim = _rows(rows, bfloat16).values.shape[1]
    _array(pilot, np.float64, (dim,), "pilot")
    _array(products, np.float64, (dim, dim), "products", True)
    bad = _Bad()
    for unit in _unit_chunks(rows, bfloat16, sums, keys, bad):
        unit -= pilot
        products += np.tril(unit.T @ unit)
    return bad.found


def transformed_moments(
    rows: NDArray[Any], bfloat16: bool, row_map: RowMap, sums: NDArray[np.int64], num_threads: int
) -> BadRows:
    _check_threads(num_threads)
    of = _rows(rows, bfloat16)
    _check_dim(of, row_map.dim, "row_map")
    _array(sums, np.int64, (row_map.dim + NUM_FACTORS,), "sums", True)
    return _add_mapped(of, sums[: row_map.dim], row_map, lambda values: values)


def affine_moments(
    rows: NDArray[Any], bfloat16: bool, affine: AffineMap, row_map: RowMap, sums: NDArray[np.int64], num_threads: int
) -> BadRows:
    _check_threads(num_threads)
    of = _rows(rows, bfloat16)
    _check_dim(of, affine.dim, "affine")
    _check_dims(affine, row_map)
    _array(sums, np.int64, (affine.out_dim + NUM_FACTORS,), "sums", True)
    return _add_mapped(of, sums[: affine.out_dim], row_map, affine.apply)


def find_bad_rows(rows: NDArray[Any], bfloat16: bool, num_threads: int) -> BadRows:
    _check_threads(num_threads)
    bad = _Bad()
    for part, values in _chunks(_rows(rows, bfloat16)):
        bad.among(values, part)
    return bad.found


# ---- The maps of rows ------------------------------------------------------------------------------------------------


def row_transform(
    rows: NDArray[Any], bfloat16: bool, out: NDArray[Any], out_bfloat16: bool, row_map: RowMap, num_threads: int
) -> BadRows:
    _check_threads(num_threads)
    of = _rows(rows, bfloat16)
    to = _out_rows(out, out_bfloat16, of, rows.shape[1])
    _check_dim(of, row_map.dim, "row_map")
    return _write(of, to, lambda values, _: row_map.apply(values))


def row_transform_by_domain(
    rows: NDArray[Any],
    bfloat16: bool,
    out: NDArray[Any],
    out_bfloat16: bool,
    row_maps: list[RowMap],
    domain: NDArray[np.int64],
    num_threads: int,
) -> BadRows:
    _check_threads(num_threads)
    of = _rows(rows, bfloat16)
    _array(domain, np.int64, (len(rows),), "domain")
    wrong = (domain < 0) | (domain >= len(row_maps))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"domain must lie in [0, {len(row_maps)}), got {domain[row]} for row {row}")
    to = _out_rows(out, out_bfloat16, of, rows.shape[1])
    for row_map in row_maps:
        _check_dim(of, row_map.dim, "row_map")

    def make(values: Matrix, part: slice) -> Matrix:
        mapped = np.empty_like(values)
        for number in np.unique(domain[part]):
            chosen = domain[part] == number
            mapped[chosen] = row_maps[number].apply(values[chosen])
        return mapped

    return _write(of, to, make)


def staged_transform(
    rows: NDArray[Any],
    bfloat16: bool,
    out: NDArray[Any],
    out_bfloat16: bool,
    affine: AffineMap | None,
    row_map: RowMap | None,
    noise_std: float,
    seed: int,
    index: NDArray[np.int64] | None,
    first_index: int,
    num_threads: int,
) -> BadRows:
    _check_threads(num_threads)
    of = _rows(rows, bfloat16)
    if affine is not None:
        _check_dim(of, affine.dim, "affine")
        if row_map is not None:
            _check_dims(affine, row_map)
    elif row_map is not None:
        _check_dim(of, row_map.dim, "row_map")
    else:
        raise ValueError("affine and row_map must not both be None")
    to = _out_rows(out, out_bfloat16, of, rows.shape[1] if affine is None else affine.out_dim)
    if not (noise_std >= 0 and np.isfinite(noise_std)):
        raise ValueError(f"noise_std must be finite and at least 0, got {noise_std}")
    if index is not None:
        _array(index, np.int64, (len(rows),), "index")

    def make(values: Matrix, part: slice) -> Matrix:
        for step in (affine, row_map):
            if step is not None:
                values = step.apply(values)
        if noise_std > 0:
            first = first_index + part.start
            numbers = np.arange(first, first + len(values)) if index is None else index[part]
            values = reference.add_noise(values, noise_std, seed, numbers)
        return values

    return _write(of, to, make)


def _check_dims(affine: AffineMap, row_map: RowMap) -> None:
    if row_map.dim != affine.out_dim:
        raise ValueError(f"row_map must have the dimension that affine gives, {affine.out_dim}, got {row_map.dim}")


def take_rows(
    rows: NDArray[Any],
    bfloat16: bool,
    numbers: NDArray[np.int64],
    out: NDArray[Any],
    row_map: RowMap | None,
    num_threads: int,
) -> BadRows:
    _check_threads(num_threads)
    of, to = _rows(rows, bfloat16), _rows(out, bfloat16, "out")
    if row_map is not None:
        _check_dim(of, row_map.dim, "row_map")
    _check_writeable(out, "out")
    if to.dtype != of.dtype or out.shape[1] != rows.shape[1] or not out.flags.c_contiguous:
        raise ValueError("out must be contiguous and of the dtype and dimension of rows")
    if np.may_share_memory(rows, out):
        raise ValueError("out must not overlap rows")
    _array(numbers, np.int64, (len(out),), "numbers")
    wrong = (numbers < 0) | (numbers >= len(rows))
    if wrong.any():
        raise IndexError(f"row {numbers[wrong.argmax()]} of {len(rows)} rows")
    np.take(rows, numbers, axis=0, out=out, mode="clip")  # which writes to `out` at once
    return (0, 0, -1) if row_map is None else row_transform(out, bfloat16, out, bfloat16, row_map, 1)


def row_transform_backward(
    rows: NDArray[Any],
    bfloat16: bool,
    grad: NDArray[Any],
    grad_bfloat16: bool,
    out: NDArray[Any],
    row_map: RowMap,
    num_threads: int,
) -> None:
    _check_threads(num_threads)
    of, grads, to = _rows(rows, bfloat16), _rows(grad, grad_bfloat16, "grad"), _rows(out, bfloat16, "out")
    _check_dim(of, row_map.dim, "row_map")
    for name, array in (("grad", grad), ("out", out)):
        if array.shape != rows.shape:
            raise ValueError(f"{name} must have the shape of rows, {rows.shape}, got {array.shape}")
    if to.dtype != of.dtype or not out.flags.writeable or not out.flags.c_contiguous:
        raise ValueError("out must be writeable, contiguous and of the dtype of rows")
    if np.may_share_memory(rows, out) or np.may_share_memory(grad, out):
        raise ValueError("out must overlap neither rows nor grad")
    for (part, values), (_, above) in zip(_chunks(of), _chunks(grads), strict=True):
        from_float64(row_map.backward(values, above), Rows(out[part], of.dtype))


# ---- Memory and files ------------------------------------------------------------------------------------------------


def stream_read(buffer: Any, num_threads: int) -> int:
    _check_threads(num_threads)
    values = _bytes(buffer, "buffer")
    whole = values.size // 8 * 8
    return int(values[:whole].view(np.uint64).sum()) + int(values[whole:].sum())


def stream_copy(source: Any, target: Any, nontemporal: bool, num_threads: int) -> None:
    _check_threads(num_threads)
    values, to = _bytes(source, "source"), _bytes(target, "target", True)
    if values.size != to.size:
        raise ValueError(f"target must have the {values.size} bytes of source, got {to.size}")
    to[...] = values


def read_file(fd: int, buffer: Any, offset: int, num_threads: int) -> int:
    _check_threads(num_threads)
    view, done = _bytes(buffer, "buffer", True).data, 0
    while done < len(view):
        data = pread(fd, min(_READ_BYTES, len(view) - done), offset + done)
        if not data:
            break
        view[done : done + len(data)] = data
        done += len(data)
    return done


def read_rows(fds: NDArray[np.int32], offsets: NDArray[np.int64], buffer: Any, row_bytes: int, num_threads: int) -> int:
    _check_threads(num_threads)
    count, values = fds.size, _bytes(buffer, "buffer", True)
    _array(fds, np.int32, (count,), "fds")
    _array(offsets, np.int64, (count,), "offsets")
    if row_bytes < 1 or values.size != count * row_bytes:
        raise ValueError(f"buffer must hold {count} rows of {row_bytes} bytes, got {values.size} bytes")
    rows = values.reshape(count, row_bytes)
    for row, (fd, offset) in enumerate(zip(fds.tolist(), offsets.tolist(), strict=True)):
        if read_file(fd, rows[row], offset, 1) < row_bytes:
            return row
    return count


def _check_read(out: NDArray[Any], bfloat16: bool, row_map: RowMap, num_threads: int) -> None:
    _check_threads(num_threads)
    rows = _rows(out, bfloat16, "out")
    _check_writeable(out, "out")
    if not out.flags.c_contiguous:
        raise ValueError("out must be contiguous")
    _check_dim(rows, row_map.dim, "row_map")


def read_file_transform(
    fd: int, offset: int, out: NDArray[Any], bfloat16: bool, row_map: RowMap, num_threads: int
) -> tuple[int, int, int, int]:
    _check_read(out, bfloat16, row_map, num_threads)
    count = read_file(fd, out, offset, 1) // (out.shape[1] * out.itemsize)
    return count, *row_transform(out[:count], bfloat16, out[:count], bfloat16, row_map, 1)


def read_rows_transform(
    fds: NDArray[np.int32],
    offsets: NDArray[np.int64],
    out: NDArray[Any],
    bfloat16: bool,
    row_map: RowMap,
    num_threads: int,
) -> tuple[int, int, int, int]:
    _check_read(out, bfloat16, row_map, num_threads)
    _array(fds, np.int32, (len(out),), "fds")
    count = read_rows(fds, offsets, out, out.shape[1] * out.itemsize, 1)
    return count, *row_transform(out[:count], bfloat16, out[:count], bfloat16, row_map, 1)


# ---- Ids -------------------------------------------------------------------------------------------------------------


class _Ids:
    """Ids in one text; the table may lie in a file, so nothing in it is trusted."""

    def __init__(self, offsets: NDArray[np.int64], text: Any) -> None:
        if offsets.size < 1:
            raise ValueError("offsets must have at least one element")
        _array(offsets, np.int64, (offsets.size,), "offsets")
        self.offsets = offsets
        self.text = _bytes(text, "text").data
        self.count = offsets.size - 1

    def at(self, row: int) -> memoryview:
        """Return an id, empty where the offsets are not those of a part of the text."""
        begin, end = int(self.offsets[row]), int(self.offsets[row + 1])
        return self.text[begin:end] if 0 <= begin <= end <= len(self.text) else self.text[:0]


def _hash_of(text: bytes | memoryview) -> int:
    hasher = XXH64()
    hasher.update(text)
    return hasher.intdigest()


def hash_ids(offsets: NDArray[np.int64], text: Any, hashes: NDArray[np.uint64]) -> None:
    ids = _Ids(offsets, text)
    _array(hashes, np.uint64, (ids.count,), "hashes", True)
    for row in range(ids.count):
        hashes[row] = _hash_of(ids.at(row))


def find_ids(
    ids: Sequence[str],
    hashes: NDArray[np.uint64],
    rows: NDArray[np.int64],
    offsets: NDArray[np.int64],
    text: Any,
    found: NDArray[np.int64],
) -> int:
    known = _Ids(offsets, text)
    _array(hashes, np.uint64, (known.count,), "hashes")
    _array(rows, np.int64, (known.count,), "rows")
    _array(found, np.int64, (len(ids),), "found", True)
    for number, each in enumerate(ids):
        try:
            encoded = each.encode()
        except (AttributeError, UnicodeEncodeError):
            raise TypeError(f"ids must be text, got {each!r}") from None
        found[number] = _find(known, hashes, rows, encoded)
    missing = np.flatnonzero(found < 0)
    return int(missing[0]) if len(missing) else -1


def _find(ids: _Ids, hashes: NDArray[np.uint64], rows: NDArray[np.int64], wanted: bytes) -> int:
    key = np.uint64(_hash_of(wanted))
    at = int(hashes.searchsorted(key))
    while at < ids.count and hashes[at] == key:
        row = int(rows[at])
        if 0 <= row < ids.count and ids.at(row) == wanted:
            return row
        at += 1
    return -1


# ---- Instruction sets ------------------------------------------------------------------------------------------------


def instruction_sets() -> list[str]:
    return ["plain"]


def instruction_set() -> str:
    return "plain"


def has_fast_products() -> bool:
    return False


def use_instruction_set(name: str) -> None:
    if name not in ("auto", "plain"):
        raise ValueError(f"instruction set must be one of auto, plain without the extension, got '{name}'")
