"""Files read and mapped in one pass, files as memory, rows from anywhere in memory: the values, and what is wrong."""

import gc
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from realign_fast._native import _C, HAS_EXTENSION

maps_files = pytest.mark.skipif(not HAS_EXTENSION, reason="without the extension, files are read and not mapped")
DTYPES = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32, "float64": np.float64}
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request):
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


def make(count, dim, dtype):
    rows = np.random.default_rng(count + dim).normal(size=(count, dim)).astype(np.float32)
    return (rows.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else rows.astype(DTYPES[dtype])


def map_of(dim):
    rng = np.random.default_rng(dim)
    return _C.RowMap(1.2, 0.3 * rng.normal(size=dim) / dim**0.5, 0.1 * rng.normal(size=dim) / dim**0.5)


def file_of(path, rows, before=24):
    path.write_bytes(bytes(before) + rows.tobytes())
    return os.open(path, os.O_RDONLY)


# One row, fewer than a block, more than a piece of 256 KB, rows larger than a piece, and more than 4 MiB in all.
@pytest.mark.parametrize(
    ("count", "dim"), [(1, 1), (3, 255), (700, 768), (4099, 64), (3, 200_001), (3001, 700), (3, 700_001)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_mapped_as_they_are_in_memory(tmp_path, instruction_set, count, dim, dtype):
    rows = make(count, dim, dtype)
    bfloat16 = dtype == "bfloat16"
    expected = np.empty_like(rows)
    _C.row_transform(rows, bfloat16, expected, bfloat16, map_of(dim), 1)
    fd = file_of(tmp_path / "a", rows)
    order = np.random.default_rng(0).permutation(count)
    for threads in (1, 2, 3):
        out = np.full_like(rows, 7)
        assert _C.read_file_transform(fd, 24, out, bfloat16, map_of(dim), threads) == (count, 0, 0, -1)
        np.testing.assert_array_equal(out, expected)
        out[:] = 7
        offsets = 24 + order * rows[0].nbytes
        found = _C.read_rows_transform(np.full(count, fd, np.int32), offsets, out, bfloat16, map_of(dim), threads)
        assert found == (count, 0, 0, -1)
        np.testing.assert_array_equal(out, expected[order])
    os.close(fd)


# One row, fewer than are asked for ahead, more than a piece of 64 KB, a row larger than one, more than 4 MiB in all.
@pytest.mark.parametrize(("count", "dim"), [(1, 1), (3, 255), (700, 768), (3, 200_001), (3001, 700)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_taken_from_anywhere(instruction_set, count, dim, dtype):
    bfloat16 = dtype == "bfloat16"
    wide = make(count, dim + 3, dtype)
    rows, expected = wide[:, 2:-1], np.empty((count, dim), wide.dtype)
    _C.row_transform(rows, bfloat16, expected, bfloat16, map_of(dim), 1)
    numbers = np.random.default_rng(0).integers(count, size=count + count // 2)
    for threads in (1, 2, 3):
        for row_map, wanted in ((map_of(dim), expected), (None, rows)):
            out = np.full((len(numbers), dim), 7, wide.dtype)
            assert _C.take_rows(rows, bfloat16, numbers, out, row_map, threads) == (0, 0, -1)
            np.testing.assert_array_equal(out, wanted[numbers])
    assert _C.take_rows(rows, bfloat16, numbers[:0], out[:0], None, 2) == (0, 0, -1)


def test_bad_rows_that_are_taken(instruction_set):
    rows = make(5000, 300, "float32")
    rows[7] = 0
    rows[9, 3] = np.nan
    numbers = np.arange(5000)[::-1].copy()
    for threads in (1, 2):
        out = np.empty_like(rows)
        assert _C.take_rows(rows, False, numbers, out, map_of(300), threads) == (1, 1, 4990)
        assert not out[[4990, 4992]].any()


def test_one_row_of_every_other_is_all_that_is_written(tmp_path):
    rows, around = make(4, 8, "float32"), np.full((4, 8), 7, np.float32)
    out, fd = around[::2][:1], file_of(tmp_path / "a", rows)
    for row_map in (map_of(8), None):
        assert _C.take_rows(rows, False, np.array([1]), out, row_map, 1) == (0, 0, -1)
        assert (around[1:] == 7).all()
    np.testing.assert_array_equal(out, rows[1:2])
    assert _C.read_file_transform(fd, 24, out, False, map_of(8), 1) == (1, 0, 0, -1)
    assert _C.read_rows_transform(np.array([fd], np.int32), np.array([24]), out, False, map_of(8), 1) == (1, 0, 0, -1)
    assert (around[1:] == 7).all()
    os.close(fd)


def test_rows_that_cannot_be_taken():
    rows, out = make(4, 8, "float32"), np.empty((2, 8), np.float32)
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match=f"row {wrong} of 4 rows"):
            _C.take_rows(rows, False, np.array([0, wrong]), out, None, 1)
    with pytest.raises(ValueError, match="numbers must be contiguous of shape"):
        _C.take_rows(rows, False, np.array([0]), out, None, 1)
    with pytest.raises(ValueError, match="dimension of row_map"):
        _C.take_rows(rows, False, np.array([0, 1]), out, map_of(9), 1)
    for wrong in (out.astype(np.float64), np.empty((2, 7), np.float32), np.empty((2, 16), np.float32)[:, :8]):
        with pytest.raises(ValueError, match="out must be contiguous and of the dtype and dimension of rows"):
            _C.take_rows(rows, False, np.array([0, 1]), wrong, None, 1)
    with pytest.raises(ValueError, match="overlap"):
        _C.take_rows(rows, False, np.array([0, 1]), rows[:2], None, 1)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        _C.take_rows(rows, False, np.array([0, 1]), out, None, 1)


@pytest.mark.parametrize("dim", [96, 300], ids=["in pieces", "where it lies"])
def test_bad_rows_are_counted_and_the_first_is_named(tmp_path, dim):
    rows = make(5000, dim, "float32")
    rows[[4100, 4800]] = 0
    rows[4500, 3] = np.inf
    fd = file_of(tmp_path / "a", rows)
    for threads in (1, 2):
        out = np.empty_like(rows)
        assert _C.read_file_transform(fd, 24, out, False, map_of(dim), threads) == (5000, 2, 1, 4100)
        assert not out[[4100, 4500, 4800]].any()
    os.close(fd)


def test_rows_at_an_odd_place_of_a_file(tmp_path):
    rows = make(3001, 700, "float32")
    expected, out = np.empty_like(rows), np.empty_like(rows)
    _C.row_transform(rows, False, expected, False, map_of(700), 1)
    fd = file_of(tmp_path / "a", rows, before=25)
    assert _C.read_file_transform(fd, 25, out, False, map_of(700), 2) == (3001, 0, 0, -1)
    np.testing.assert_array_equal(out, expected)
    os.close(fd)


def test_what_cannot_be_memory_is_read():
    fd = os.open("/dev/urandom", os.O_RDONLY)
    out = np.zeros((3001, 700), np.float32)
    num_read, num_zero, num_nonfinite, _ = _C.read_file_transform(fd, 0, out, False, map_of(700), 2)
    os.close(fd)
    good = np.linalg.norm(out, axis=1) > 0
    assert (num_read, num_zero, num_nonfinite) == (3001, 0, 3001 - good.sum())
    np.testing.assert_allclose(np.linalg.norm(out[good], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("dim", [96, 300], ids=["in pieces", "where it lies"])
def test_a_file_that_ends_early(tmp_path, dim):
    rows = make(5000, dim, "float32")
    fd = file_of(tmp_path / "a", rows)
    os.truncate(tmp_path / "a", 24 + 3000 * dim * 4 + 10)
    out = np.empty_like(rows)
    assert _C.read_file_transform(fd, 24, out, False, map_of(dim), 2)[0] == 3000
    offsets = 24 + np.arange(5000) * dim * 4
    assert _C.read_rows_transform(np.full(5000, fd, np.int32), offsets, out, False, map_of(dim), 2)[0] == 3000
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _C.read_file_transform(fd, 24, out, False, map_of(dim), 2)


def test_wrong_arguments(tmp_path):
    fd = file_of(tmp_path / "a", make(4, 8, "float32"))
    out = np.empty((4, 8), np.float32)
    with pytest.raises(ValueError, match="dimension of row_map"):
        _C.read_file_transform(fd, 0, out, False, map_of(9), 1)
    with pytest.raises(ValueError, match="contiguous"):
        _C.read_file_transform(fd, 0, np.empty((4, 16), np.float32)[:, :8], False, map_of(8), 1)
    with pytest.raises(ValueError, match="offsets"):
        _C.read_rows_transform(np.zeros(4, np.int32), np.zeros(3, np.int64), out, False, map_of(8), 1)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        _C.read_file_transform(fd, 0, out, False, map_of(8), 1)
    os.close(fd)


@maps_files
@pytest.mark.parametrize(("offset", "size"), [(-1, 5), (0, 0)])
def test_no_map_of_nothing(tmp_path, offset, size):
    fd = file_of(tmp_path / "a", make(4, 8, "float32"))
    with pytest.raises(ValueError, match="a map begins"):
        _C.FileMap(fd, offset, size)
    os.close(fd)


@maps_files
@pytest.mark.parametrize("offset", [0, 1, 24, PAGE - 1, PAGE, PAGE + 8])
def test_a_file_as_memory(tmp_path, offset):
    data = np.random.default_rng(0).integers(0, 256, 5 * PAGE, np.uint8)
    (tmp_path / "a").write_bytes(data.tobytes())
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    mapped = _C.FileMap(fd, offset, data.size - offset)
    os.close(fd)  # a map outlives it
    values = np.frombuffer(mapped, np.uint8)
    np.testing.assert_array_equal(values, data[offset:])
    assert not values.flags.writeable
    assert not mapped.broken
    del mapped
    gc.collect()
    np.testing.assert_array_equal(values, data[offset:])  # an array keeps its map


@maps_files
def test_a_map_of_a_file_that_is_cut_short(tmp_path):
    """Zeros are read in the place of what is gone; other maps and a later one of the same file are good."""
    path = tmp_path / "a"
    path.write_bytes(b"\1" * 8 * PAGE)
    fd = os.open(path, os.O_RDONLY)
    whole, other = _C.FileMap(fd, 0, 8 * PAGE), _C.FileMap(fd, 0, 2 * PAGE)
    os.truncate(path, 2 * PAGE)
    values = np.frombuffer(whole, np.uint8)
    assert values.sum() == 2 * PAGE
    assert whole.broken
    assert np.frombuffer(other, np.uint8).sum() == 2 * PAGE
    assert not other.broken
    again = _C.FileMap(fd, PAGE, PAGE)
    assert np.frombuffer(again, np.uint8).sum() == PAGE
    assert not again.broken
    os.close(fd)


@maps_files
def test_a_map_is_cut_short_under_many_threads(tmp_path):
    path = tmp_path / "a"
    rows = make(20_000, 64, "float32")
    path.write_bytes(rows.tobytes())
    fd = os.open(path, os.O_RDONLY)
    mapped = _C.FileMap(fd, 0, rows.nbytes)
    os.truncate(path, rows.nbytes // 2)
    sums = np.zeros(64, np.int64)
    values = np.frombuffer(mapped, np.float32).reshape(rows.shape)
    num_zero, _, first = _C.moments(values, False, sums, None, 4)
    assert mapped.broken
    assert num_zero == pytest.approx(10_000, abs=20)
    assert first == pytest.approx(10_000, abs=20)
    os.close(fd)


@maps_files
@pytest.mark.parametrize("options", [[], ["-X", "faulthandler"]])
def test_other_bus_errors_still_end_the_process(tmp_path, options):
    code = f"""
import mmap, os
from realign_fast._native import _C
path = {str(tmp_path / "a")!r}
open(path, "wb").write(bytes(4 * mmap.PAGESIZE))
fd = os.open(path, os.O_RDONLY)
ours, theirs = _C.FileMap(fd, 0, 4 * mmap.PAGESIZE), mmap.mmap(fd, 0, prot=mmap.PROT_READ)
os.truncate(path, 0)
assert not any(bytes(ours)) and ours.broken
theirs[3 * mmap.PAGESIZE]
"""
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGBUS, done.stderr
