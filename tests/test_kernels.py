"""Every kernel on every instruction set of this machine, against the plain float64 version."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from realign_fast import reference
from realign_fast._dtypes import DTYPES, Rows, from_float64, storage, to_float64
from realign_fast._native import _C

# 1 and 3: shorter than a vector; 127, 255: no multiple of one; 1152, 4096: more than the first-level cache holds.
DIMS = (1, 3, 127, 255, 512, 768, 1024, 1152, 1280, 4096)
COUNTS = (0, 1, 63, 64, 65)  # around the blocks of eight rows, and none
# Half the last place of a unit row's largest element, with room for the sums behind it.
OUT_TOLERANCE = {"float16": 2.5e-4 + 2e-7, "bfloat16": 2e-3 + 2e-7, "float32": 2e-7, "float64": 1e-14}


@pytest.fixture(params=_C.instruction_sets(), autouse=True)
def instruction_set(request):
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set("auto")


def cast(values: np.ndarray, dtype: str) -> Rows:
    rows = Rows(np.empty(values.shape, storage(dtype)), dtype)
    from_float64(values.astype(np.float64), rows)
    return rows


def make(count: int, dim: int, dtype: str = "float32", seed: int = 0) -> Rows:
    return cast(reference.project(np.random.default_rng(seed).normal(0.05, 1, (count, dim))), dtype)


def make_map(dim: int, seed: int = 1) -> tuple[float, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 1.2, 0.5 * rng.normal(size=dim) / np.sqrt(dim), 0.1 * rng.normal(size=dim) / np.sqrt(dim)


def transform(rows: Rows, mapping, dtype: str | None = None, out: np.ndarray | None = None, threads: int = 1):
    dtype = dtype or rows.dtype
    if out is None:
        out = np.full(rows.values.shape, np.nan if dtype != "bfloat16" else 0x7FC0, storage(dtype))
    bad = _C.row_transform(rows.values, rows.bfloat16, out, dtype == "bfloat16", _C.RowMap(*mapping), threads)
    return Rows(out, dtype), bad


def sums_of(rows: Rows, threads: int = 1, keys=None) -> np.ndarray:
    sums = np.zeros(rows.values.shape[1], np.int64)
    _C.moments(rows.values, rows.bfloat16, sums, keys, threads)
    return sums


def assert_transformed(rows: Rows, mapping, dtype: str | None = None) -> None:
    out, _ = transform(rows, mapping, dtype)
    expected = reference.row_transform(to_float64(rows), *mapping)
    np.testing.assert_allclose(to_float64(out), expected, rtol=0, atol=OUT_TOLERANCE[out.dtype])


@pytest.mark.parametrize("count", [1, 13, 64])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_map_without_a_correction_gives_the_bits_of_one_with_none_to_speak_of(dtype, count):
    """What a fit maps first has none, and the kernel leaves it out."""
    for dim in (65, 255, 768):
        rows, (scale, shift, _) = make(count, dim, dtype), make_map(dim)
        sums = np.zeros((2, dim), np.int64)
        for each, correction in zip(sums, (0.0, 1e-30), strict=True):
            mapped = np.zeros(dim + _C.NUM_FACTORS, np.int64)
            row_map = _C.RowMap(scale, shift, np.full(dim, correction))
            _C.transformed_moments(rows.values, rows.bfloat16, row_map, mapped, 1)
            row_map.add_up(mapped, each)
        np.testing.assert_array_equal(*sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads_chunks_or_alignment(dtype):
    rows, mapping = make(9001, 131, dtype), make_map(131)
    out, _ = transform(rows, mapping)
    keys = np.empty(9001, np.uint64)
    sums = sums_of(rows, 1, keys)
    assert len(np.unique(keys)) == 9001
    for threads in (2, 3, 7):
        again = np.zeros_like(keys)
        np.testing.assert_array_equal(transform(rows, mapping, threads=threads)[0].values, out.values)
        np.testing.assert_array_equal(sums_of(rows, threads, again), sums)
        np.testing.assert_array_equal(again, keys)
    parts = [Rows(part, dtype) for part in np.array_split(rows.values, [1, 9, 100, 5000])]
    np.testing.assert_array_equal(sum(sums_of(part) for part in parts[::-1]), sums)
    np.testing.assert_array_equal(np.concatenate([transform(part, mapping)[0].values for part in parts]), out.values)
    # One byte past an aligned address, in and out, and rows apart.
    itemsize = rows.values.itemsize
    stride = 131 * itemsize + 5
    for data in (np.zeros(9001 * stride + 1, np.uint8),):
        view = np.ndarray(rows.values.shape, rows.values.dtype, data.data, 1, (stride, itemsize))
        view[...] = rows.values
        odd = Rows(view, dtype)
        np.testing.assert_array_equal(sums_of(odd), sums)
        np.testing.assert_array_equal(transform(odd, mapping)[0].values, out.values)
        transform(odd, mapping, out=view)
        np.testing.assert_array_equal(view, out.values)
    reversed_rows = Rows(rows.values[::-1], dtype)
    np.testing.assert_array_equal(transform(reversed_rows, mapping)[0].values, out.values[::-1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_streamed_stores_write_the_same(dtype, offset):
    """More than 16 MiB go past the caches: any start within a vector must give the same elements."""
    rows, mapping = make(600, 97, dtype), make_map(97)
    expected, _ = transform(rows, mapping)
    repeats = (17 << 20) // rows.values.nbytes + 1
    many = Rows(np.tile(rows.values, (repeats, 1)), dtype)
    space = np.zeros(many.values.size + 64, many.values.dtype)
    out = space[offset : offset + many.values.size].reshape(many.values.shape)
    transform(many, mapping, out=out, threads=2)
    np.testing.assert_array_equal(out, np.tile(expected.values, (repeats, 1)))
    assert not space[:offset].any()
    assert not space[offset + many.values.size :].any()


@pytest.mark.parametrize("exponent", [-1070, -1000, 1000])
def test_float64_beyond_the_squares(exponent):
    assert_transformed(
        Rows(np.ldexp(np.random.default_rng(0).normal(size=(9, 130)), exponent), "float64"), make_map(130)
    )


def test_a_row_at_the_origin_becomes_zero():
    row = Rows(np.zeros((1, 80)), "float64")
    row.values[0, 3] = 2
    out, bad = transform(row, (1.0, -row.values[0] / 2, np.zeros(80)))
    assert bad == (0, 0, -1)
    assert not out.values.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, 200])
def test_bad_rows_are_found_and_become_zeros(dtype, dim):
    values = to_float64(make(40, dim))
    values[4, 1], values[11, dim - 1], values[12, 0], values[20] = np.nan, np.inf, -np.inf, 0
    rows = cast(values, dtype)
    good = np.delete(values, [4, 11, 12, 20], axis=0)
    for threads in (1, 3):
        assert _C.find_bad_rows(rows.values, rows.bfloat16, threads) == (1, 3, 4)
        out, bad = transform(rows, make_map(dim), threads=threads)
        assert bad == (1, 3, 4)
        assert not to_float64(out)[[4, 11, 12, 20]].any()
    keys = np.ones(40, np.uint64)
    np.testing.assert_array_equal(sums_of(rows, 1, keys), sums_of(cast(good, dtype)))
    assert np.flatnonzero(keys == 0).tolist() == [4, 11, 12, 20]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_results_are_rounded_to_nearest(dtype):
    rows = make(300, 700)
    wide, _ = transform(rows, make_map(700))
    narrow, _ = transform(rows, make_map(700), dtype)
    np.testing.assert_array_equal(narrow.values, cast(wide.values, dtype).values)


def test_a_forked_child_can_run_kernels():
    rows = make(4000, 300)
    expected = sums_of(rows, 3)
    child = os.fork()
    if child == 0:
        os._exit(0 if (sums_of(rows, 3) == expected).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_while_kernels_run_can_run_them():
    rows = make(4000, 300)
    expected = sums_of(rows, 3)
    done = threading.Event()

    def keep_busy():
        while not done.is_set():
            sums_of(rows, 3)

    busy = [threading.Thread(target=keep_busy) for _ in range(2)]
    for thread in busy:
        thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0 if (sums_of(rows, 3) == expected).all() else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        for thread in busy:
            thread.join()


def test_callers_at_once_do_not_meet():
    batches = [make(count, 256) for count in (700, 1500, 4000, 9001)]
    expected = [sums_of(rows) for rows in batches]
    with ThreadPoolExecutor(len(batches)) as pool:
        for _ in range(30):
            found = list(pool.map(lambda rows: sums_of(rows, 3), batches))
            np.testing.assert_array_equal(found, expected)


def test_arguments_that_do_not_fit_are_refused(instruction_set):
    rows, row_map = make(4, 6).values, _C.RowMap(*make_map(6))
    out = np.empty_like(rows)
    flat = np.zeros(40, np.float32)
    for arguments, error, message in [
        (
            (rows.astype(np.int32), False, out, False, row_map, 1),
            TypeError,
            "rows must be float16, float32 or float64",
        ),
        ((rows.astype(">f4"), False, out, False, row_map, 1), TypeError, "native byte order"),
        ((rows, True, out, False, row_map, 1), TypeError, "rows must be uint16 holding bfloat16"),
        ((rows[0], False, out, False, row_map, 1), ValueError, r"rows must have shape \(n, dim\)"),
        ((rows[:, ::2], False, out[:, ::2], False, row_map, 1), ValueError, "contiguous last axis"),
        ((rows, False, out[:3], False, row_map, 1), ValueError, r"out must have shape \(4, 6\), got \(3, 6\)"),
        (
            (rows, False, out, False, _C.RowMap(*make_map(5)), 1),
            ValueError,
            "rows must have the dimension of row_map, 5",
        ),
        ((rows, False, out, False, row_map, 0), ValueError, "num_threads must be at least 1"),
        ((flat[:24].reshape(4, 6), False, flat[6:30].reshape(4, 6), False, row_map, 1), ValueError, "not overlap"),
    ]:
        with pytest.raises(error, match=message):
            _C.row_transform(*arguments)
    grad = np.ones_like(rows)
    for arguments, message in [
        ((rows, False, grad[:3], False, out, row_map, 1), "grad must have the shape of rows"),
        ((rows, False, grad, False, out[:, :5], row_map, 1), "out must have the shape of rows"),
        (
            (rows, False, grad, False, out.astype(np.float64), row_map, 1),
            "out must be writeable, contiguous and of the",
        ),
        (
            (rows, False, grad, False, np.empty((6, 4), np.float32).T, row_map, 1),
            "out must have a contiguous last axis",
        ),
        ((rows, False, grad, False, grad, row_map, 1), "out must overlap neither rows nor grad"),
        ((rows, False, grad, False, out, _C.RowMap(*make_map(5)), 1), "rows must have the dimension of row_map, 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.row_transform_backward(*arguments)
    vector = np.zeros(6)
    for arguments, error, message in [
        ((1.0, vector, np.zeros(5)), ValueError, r"correction must be contiguous of shape \(6,\)"),
        ((1.0, np.zeros((2, 6)), vector), ValueError, r"shift must have shape \(dim,\)"),
        ((1.0, np.zeros(12)[::2], vector), ValueError, "shift must be contiguous"),
        ((1.0, vector, np.zeros(6, np.float32)), TypeError, "correction must be float64"),
        ((np.nan, vector, vector), ValueError, "scale must be finite"),
    ]:
        with pytest.raises(error, match=message):
            _C.RowMap(*arguments)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        _C.row_transform(rows, False, out, False, row_map, 1)
    with pytest.raises(ValueError, match=r"instruction set must be one of auto, (baseline|plain)"):
        _C.use_instruction_set("mmx")
    assert _C.instruction_set() == instruction_set


@given(st.lists(st.binary(max_size=100), max_size=8), st.integers(0, 2**64 - 1))
def test_xxh64_is_that_of_the_xxhash_package(parts, seed):
    ours, theirs = _C.XXH64(seed), xxhash.xxh64(seed=seed)
    for part in parts:
        ours.update(part)
        theirs.update(part)
        assert ours.intdigest() == theirs.intdigest()
    assert ours.hexdigest() == theirs.hexdigest()


@pytest.mark.parametrize("size", [0, 1, 63, 1000, 3_000_001])
def test_streams_touch_every_byte(size):
    source = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    for nontemporal in (False, True):
        target = np.zeros_like(source)
        _C.stream_copy(source, target, nontemporal, 2)
        np.testing.assert_array_equal(target, source)
    _C.stream_read(source, 2)
