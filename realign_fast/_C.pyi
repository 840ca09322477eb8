"""The C++ extension: kernels over rows of embeddings, and the hashes of the file layer.

Every `rows` is `(n, dim)` with a contiguous last axis, any row stride (also 0 or negative) and any alignment;
its dtype is float16, float32, float64, or uint16 holding bfloat16 bits where `bfloat16` is true. A dtype or layout
that does not fit raises instead of copying. `num_threads` counts the calling thread. The GIL is released.

A *bad* row holds a NaN or an infinity, or has norm zero. Functions return what they met as
`(num_zero, num_nonfinite, first_bad)`, `first_bad` being the least index of a bad row or -1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

Rows = NDArray[Any]
BadRows = tuple[int, int, int]
Bytes = Buffer | NDArray[Any]

FIXED_POINT_BITS: int
"""Moments count in units of 2**-FIXED_POINT_BITS (27)."""

NUM_FACTORS: int
"""Sums of mapped rows have so many more elements than the rows."""

def instruction_sets() -> list[str]:
    """Names that this build has and this processor runs, slowest first: baseline, avx2, avx512, neon."""

def instruction_set() -> str:
    """Return the one in use."""

def has_fast_products() -> bool:
    """Return whether this processor has dot products of bfloat16 for the instruction set in use (AVX512-BF16)."""

def use_instruction_set(name: str) -> None:
    """Use `name` from now on in this process ("auto": the fastest). ValueError if it cannot run here."""

class RowMap:
    """The map `pi(pi(scale * u + shift) + correction)` of unit rows `u = pi(row)`, prepared for the kernels.

    `shift` and `correction` are contiguous (dim,) and copied. ValueError or TypeError where they are not, or where
    `scale` is not finite.
    """

    def __init__(self, scale: float, shift: NDArray[np.float64], correction: NDArray[np.float64]) -> None: ...
    @property
    def dim(self) -> int: ...
    def add_up(self, mapped: NDArray[np.int64], sums: NDArray[np.int64]) -> None:
        """Add to `sums` (dim,), in units of 2**-FIXED_POINT_BITS, what `transformed_moments` found altogether."""

def moments(
    rows: Rows,
    bfloat16: bool,
    sums: NDArray[np.int64],
    keys: NDArray[np.uint64] | None,
    num_threads: int,
) -> BadRows:
    """Add each good row, normalised and rounded to fixed point, to `sums` (dim,).

    `keys` (n,), where given, receives a hash of each row's content (0 for a bad row), by which samples are chosen.
    """

def covariance(
    rows: Rows,
    bfloat16: bool,
    pilot: NDArray[np.float64],
    sums: NDArray[np.int64],
    keys: NDArray[np.uint64] | None,
    products: NDArray[np.float64],
    num_seen: int,
    fast: bool,
    num_threads: int,
) -> BadRows:
    """As `moments`, and add `(u - pilot)(u - pilot)^T` of each good unit row `u` to the lower triangle of `products`.

    `pilot` is (dim,), `products` (dim, dim). `num_seen` rows are in them already: of more rows, sums in float32 may be
    longer. The same bits for any number of threads. With `fast`, the products are of bfloat16 where
    `has_fast_products`.
    """

def transformed_moments(
    rows: Rows,
    bfloat16: bool,
    row_map: RowMap,
    sums: NDArray[np.int64],
    num_threads: int,
) -> BadRows:
    """As `moments`, of the rows that `row_transform` would write; nothing is written.

    A row there is `a u + b shift + c correction`. Its parts are added to `sums` (dim + NUM_FACTORS,): the `a u`, and
    behind them `b` and `c`; `RowMap.add_up` adds the vectors to the sums of all. Sums of any order and division of
    the rows are the same; their units are those of the map.
    """

def row_transform(
    rows: Rows,
    bfloat16: bool,
    out: Rows,
    out_bfloat16: bool,
    row_map: RowMap,
    num_threads: int,
) -> BadRows:
    """Write what `row_map` makes of each row; a bad row becomes zeros.

    `out` may be `rows` itself; it must not overlap it otherwise.
    """

def row_transform_by_domain(
    rows: Rows,
    bfloat16: bool,
    out: Rows,
    out_bfloat16: bool,
    row_maps: list[RowMap],
    domain: NDArray[np.int64],
    num_threads: int,
) -> BadRows:
    """As `row_transform`, row `i` by `row_maps[domain[i]]`. ValueError where there is no such map."""

class AffineMap:
    """`matrix (u - centre) + offset` of unit rows `u = pi(row)`, prepared for the kernels.

    `matrix` is contiguous (out_dim, dim), out_dim at most dim, `centre` (dim,), `offset` (out_dim,); all are copied,
    as float32.
    """

    def __init__(
        self, matrix: NDArray[np.float64], centre: NDArray[np.float64], offset: NDArray[np.float64]
    ) -> None: ...
    @property
    def dim(self) -> int: ...
    @property
    def out_dim(self) -> int: ...

def staged_transform(
    rows: Rows,
    bfloat16: bool,
    out: Rows,
    out_bfloat16: bool,
    affine: AffineMap | None,
    row_map: RowMap | None,
    noise_std: float,
    seed: int,
    index: NDArray[np.int64] | None,
    first_index: int,
    num_threads: int,
) -> BadRows:
    """Write what becomes of each row in steps that are each left out where not given; a bad row becomes zeros.

    `affine`, else `row_map`, then the other of them, then `pi(row + noise_std * n)`, `n` Gaussian: Philox 4x32-10 and
    Box-Muller, of `seed` and the row's number, `index[i]` or `first_index + i`. All steps after the first are in
    float32. `out` may be `rows` itself where the dimension stays; it must not overlap it otherwise.
    """

def affine_moments(
    rows: Rows,
    bfloat16: bool,
    affine: AffineMap,
    row_map: RowMap,
    sums: NDArray[np.int64],
    num_threads: int,
) -> BadRows:
    """As `moments`, of what `affine`, then `row_map` make of the rows; nothing is written."""

def take_rows(
    rows: Rows,
    bfloat16: bool,
    numbers: NDArray[np.int64],
    out: Rows,
    row_map: RowMap | None,
    num_threads: int,
) -> BadRows:
    """Write to `out[i]` what `row_map`, if any, makes of the row with number `numbers[i]`, as `row_transform` does.

    `out` is contiguous, has the dtype of `rows` and does not overlap them. IndexError where there is no such row.
    """

def row_transform_backward(
    rows: Rows,
    bfloat16: bool,
    grad: Rows,
    grad_bfloat16: bool,
    out: Rows,
    row_map: RowMap,
    num_threads: int,
) -> None:
    """Write the gradient with respect to `rows` of `sum(grad * out)`, `out` being what `row_transform` makes of them.

    `out` is contiguous and has the dtype of `rows`. Bad rows have gradient 0.
    """

def find_bad_rows(rows: Rows, bfloat16: bool, num_threads: int) -> BadRows:
    """Read the rows and say which are bad."""

def stream_read(buffer: Bytes, num_threads: int) -> int:
    """Sum the 64-bit words of `buffer`: the least that a kernel which reads can take."""

def stream_copy(source: Bytes, target: Bytes, nontemporal: bool, num_threads: int) -> None:
    """Copy with ordinary or non-temporal stores: the least that a kernel which reads and writes can take."""

class FileMap:
    """Part of an open file as memory, a buffer of bytes that can be read.

    Where the file has become shorter meanwhile, or the disk fails, zeros are read, and `broken` becomes true.
    """

    def __init__(self, fd: int, offset: int, size: int) -> None: ...
    @property
    def broken(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def read_file(fd: int, buffer: Bytes, offset: int, num_threads: int) -> int:
    """Fill `buffer` from byte `offset` of the file on; return the bytes read, fewer than asked only at its end."""

def read_rows(
    fds: NDArray[np.int32], offsets: NDArray[np.int64], buffer: Bytes, row_bytes: int, num_threads: int
) -> int:
    """Copy row after row, `row_bytes` from `offsets[i]` of file `fds[i]` on, into `buffer`.

    Returns the first row that its file has not all of, or their number.
    """

def read_file_transform(
    fd: int, offset: int, out: NDArray[Any], bfloat16: bool, row_map: RowMap, num_threads: int
) -> tuple[int, int, int, int]:
    """Fill `out` `(n, dim)` from byte `offset` of the file on, and map its rows in their place.

    Returns the first row that the file has not all of, or their number, and what `row_transform` returns.
    """

def read_rows_transform(
    fds: NDArray[np.int32],
    offsets: NDArray[np.int64],
    out: NDArray[Any],
    bfloat16: bool,
    row_map: RowMap,
    num_threads: int,
) -> tuple[int, int, int, int]:
    """As `read_file_transform`, row `i` from `offsets[i]` of file `fds[i]` on."""

def hash_ids(offsets: NDArray[np.int64], text: Bytes, hashes: NDArray[np.uint64]) -> None:
    """Write to `hashes` (n,) that of each id; id `i` is `text[offsets[i] : offsets[i + 1]]`, UTF-8."""

def find_ids(
    ids: Sequence[str],
    hashes: NDArray[np.uint64],
    rows: NDArray[np.int64],
    offsets: NDArray[np.int64],
    text: Bytes,
    found: NDArray[np.int64],
) -> int:
    """Write to `found` the row of each id, -1 for those that there are not; `hashes` are sorted, `rows` their rows.

    Returns the place of the first id that there is not, or -1.
    """

class XXH64:
    """The 64-bit xxHash, streaming."""

    def __init__(self, seed: int = 0) -> None: ...
    def update(self, data: Bytes) -> None: ...
    def intdigest(self) -> int: ...
    def hexdigest(self) -> str: ...

def scan_pickle(data: Bytes) -> None:
    """Walk the opcodes of a pickle without running it.

    ValueError where it is truncated, uses an opcode that plain data and NumPy arrays do not need, names a length or a
    memo index larger than the data could need, or nests deeper than plain rows do.
    """
