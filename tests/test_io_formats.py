import errno
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file as save_tensors

from realign_fast._dtypes import to_float64
from realign_fast._native import _C
from realign_fast.alignment import gather_moments
from realign_fast.io._raw import Blocks
from realign_fast.io.formats import FORMATS, open_shard
from realign_fast.io.sources import open_source

DIM = 13
SUFFIXES = [".npy", ".parquet", ".arrow", ".safetensors", ".pkl", ".tar"]
FLOATS = ["float16", "float32", "float64"]
# Less than a row, some rows, all rows.
BATCH_BYTES = [1, 200, 1 << 20]


def values_of(count, dtype="float32", seed=0, dim=DIM):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(dtype)


def rows_of(data, **options):
    """All rows of a source as one array; what it states and where its batches lie has been checked."""
    source = open_source(data, name="text", **options)
    parts, starts = [], {}
    for batch in source.batches():
        assert batch.rows.dtype == source.dtype
        assert batch.rows.values.shape[1] == source.dim
        assert batch.start == starts.get(batch.origin, 0)
        assert len(batch.rows.values) > 0
        starts[batch.origin] = batch.start + len(batch.rows.values)
        parts.append(batch.rows.values.copy())
    rows = np.concatenate(parts) if parts else np.empty((0, source.dim), np.float32)
    assert source.num_rows in (None, len(rows))
    return rows


def lists_of(values, kind):
    flat = pa.array(values.reshape(-1))
    if kind == "fixed_size_list":
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    offsets = np.arange(len(values) + 1) * values.shape[1]
    if kind == "large_list":
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)


def save_table(path, table, stream=False, **options):
    if path.suffix == ".parquet":
        parquet.write_table(table, path, **options)
    else:
        with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema, **options) as writer:
            writer.write_table(table, 7)


@pytest.mark.parametrize("batch_bytes", BATCH_BYTES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_rows_in_order_in_batches_of_any_size(tmp_path, write_shard, suffix, dtype, batch_bytes):
    values = values_of(101, dtype)
    path = write_shard(tmp_path / f"a{suffix}", values)
    found = rows_of(path, batch_bytes=batch_bytes)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("first_refused", [0, 1])
def test_files_that_cannot_be_memory_are_read(tmp_path, monkeypatch, first_refused):
    """As those of some network file systems: mapping them fails, from the first window on or from a later one."""
    values = values_of(101)
    np.save(tmp_path / "a.npy", values)
    sizes, file_map = [], getattr(_C, "FileMap", None)

    def refuse(fd, offset, size):
        sizes.append(size)
        if len(sizes) > first_refused:
            raise OSError(errno.ENODEV, "No such device")
        return file_map(fd, offset, size)

    if file_map is not None:
        monkeypatch.setattr(_C, "FileMap", refuse)
        monkeypatch.setattr("realign_fast.io._raw._WINDOW_BYTES", 1)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.npy", batch_bytes=1), values)
    assert file_map is None or len(sizes) == first_refused + 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_one_row(tmp_path, write_shard, suffix):
    values = values_of(1)
    np.testing.assert_array_equal(rows_of(write_shard(tmp_path / f"a{suffix}", values)), values)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_no_rows_opens_and_adds_none(tmp_path, write_shard, suffix):
    path = write_shard(tmp_path / f"a{suffix}", values_of(0))
    assert not any(len(chunk.rows.values) for chunk in open_shard(path).chunks(Blocks(100, 3)))
    values = values_of(5)
    write_shard(tmp_path / f"b{suffix}", values)
    np.testing.assert_array_equal(rows_of(tmp_path), values)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("make", [pa.list_, pa.large_list])
def test_arrow_batches_without_rows_give_none(tmp_path, make, compression):
    batch = pa.record_batch({"embedding": pa.array([], make(pa.float32()))})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(tmp_path / "a.arrow", batch.schema, options=options) as writer:
        writer.write_batch(batch)
    chunks = open_shard(tmp_path / "a.arrow").chunks(Blocks(100, 3))
    assert sum(len(chunk.rows.values) for chunk in chunks) == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_of_dimension_one(tmp_path, write_shard, suffix):
    values = values_of(9, dim=1)
    np.testing.assert_array_equal(rows_of(write_shard(tmp_path / f"a{suffix}", values), batch_bytes=10), values)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_limit_stops_within_a_batch_and_across_files(tmp_path, write_shard, suffix):
    values = values_of(20)
    for i in range(2):
        write_shard(tmp_path / f"{i}{suffix}", values[10 * i : 10 * i + 10])
    source = open_source(tmp_path, name="text", batch_bytes=4 * DIM * 4)
    for limit in (0, 1, 6, 10, 13, 20, 99):
        found = [batch.rows.values.copy() for batch in source.batches(limit)]
        np.testing.assert_array_equal(np.concatenate([values[:0], *found]), values[:limit])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_can_be_read_again_after_half_a_read(tmp_path, write_shard, suffix):
    values = values_of(50)
    source = open_source(write_shard(tmp_path / f"a{suffix}", values), name="text", batch_bytes=300)
    for _ in range(2):
        half = source.batches()
        next(half)
        half.close()
        np.testing.assert_array_equal(np.concatenate([b.rows.values.copy() for b in source.batches()]), values)


@pytest.mark.parametrize("batch_bytes", BATCH_BYTES)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_npy_of_any_version_and_byte_order_and_layout(tmp_path, dtype, version, byte_order, order, batch_bytes):
    values = values_of(37, dtype)
    stored = np.asarray(values, np.dtype(dtype).newbyteorder(byte_order), order=order)
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, stored, version)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.npy", batch_bytes=batch_bytes), values)


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_npy_in_fortran_order_where_one_axis_is_short(tmp_path, shape, byte_order):
    values = np.arange(np.prod(shape), dtype="f4").reshape(shape)
    header = {"descr": f"{byte_order}f4", "fortran_order": True, "shape": shape}
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(values.astype(f"{byte_order}f4").T.tobytes())
    chunks = open_shard(tmp_path / "a.npy").chunks(Blocks(8, 3))
    found = np.concatenate([values[:0], *(chunk.rows.values.copy() for chunk in chunks)])
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("batch_bytes", BATCH_BYTES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables_of_every_kind_of_list(tmp_path, suffix, kind, dtype, batch_bytes):
    values = values_of(41, dtype)
    save_table(tmp_path / f"a{suffix}", pa.table({"id": range(41), "embedding": lists_of(values, kind)}))
    found = rows_of(tmp_path / f"a{suffix}", batch_bytes=batch_bytes)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables_by_the_name_of_the_column(tmp_path, suffix):
    values = values_of(8)
    table = pa.table({"embedding": ["no"] * 8, "vec": lists_of(values, "list"), "n": range(8)})
    save_table(tmp_path / f"a{suffix}", table)
    np.testing.assert_array_equal(rows_of(tmp_path / f"a{suffix}", column="vec"), values)


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"row_group_size": 6}, {"use_dictionary": True}])
def test_parquet_however_it_is_stored(tmp_path, options):
    values = np.repeat(values_of(10), 4, axis=0)
    save_table(tmp_path / "a.parquet", pa.table({"embedding": lists_of(values, "list")}), **options)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.parquet", batch_bytes=500), values)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("stream", [False, True])
def test_arrow_files_and_streams_with_and_without_compression(tmp_path, stream, compression):
    values = values_of(40)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    table = pa.table({"n": range(40), "embedding": lists_of(values, "list")})
    save_table(tmp_path / "a.arrow", table, stream, options=options)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.arrow", batch_bytes=200), values)


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
def test_arrow_batches_that_are_slices_of_a_larger_one(tmp_path, kind):
    values = values_of(30)
    table = pa.table({"embedding": lists_of(values, kind)}).slice(7, 11)
    save_table(tmp_path / "a.arrow", table)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.arrow"), values[7:18])


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables_give_their_other_columns_with_the_rows(tmp_path, suffix):
    values = values_of(25)
    table = pa.table({"id": [f"i{i}" for i in range(25)], "embedding": lists_of(values, "list"), "n": range(25)})
    save_table(tmp_path / f"a{suffix}", table)
    parts = [chunk.columns for chunk in open_shard(tmp_path / f"a{suffix}").chunks(Blocks(200, 3), columns=True)]
    assert len(parts) > 1
    assert pa.Table.from_batches(parts) == table.drop_columns("embedding")


@pytest.mark.parametrize("batch_bytes", BATCH_BYTES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors_of_every_dtype(tmp_path, dtype, batch_bytes):
    tensor = torch.from_numpy(values_of(33)).to(dtype)
    save_tensors({"weights": tensor, "labels": torch.arange(33), "bias": torch.zeros(DIM)}, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors", name="text", batch_bytes=batch_bytes)
    assert source.dtype == str(dtype).removeprefix("torch.")
    found = np.concatenate([to_float64(batch.rows) for batch in source.batches()])
    np.testing.assert_array_equal(found, tensor.double().numpy())


def test_safetensors_by_the_name_of_the_tensor(tmp_path):
    a, b, c = (torch.from_numpy(values_of(4, seed=seed)) for seed in range(3))
    save_tensors({"a": a, "embedding": b, "c": c}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(rows_of(tmp_path / "a.safetensors"), b.numpy())
    np.testing.assert_array_equal(rows_of(tmp_path / "a.safetensors", column="c"), c.numpy())


PICKLED_ROWS = {
    "arrays": lambda row: row,
    "arrays of one row": lambda row: row[None],
    "lists": lambda row: row.tolist(),
    "lists of one list": lambda row: [row.tolist()],
    "lists of NumPy scalars": list,
    "big-endian arrays": lambda row: row.astype(row.dtype.newbyteorder(">")),
    "read-only arrays": lambda row: np.frombuffer(row.tobytes(), row.dtype),
    "strided arrays": lambda row: np.repeat(row, 2)[::2],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", PICKLED_ROWS)
def test_pickles_of_every_protocol_and_form_of_rows(tmp_path, form, protocol):
    values = values_of(23)
    dicts = [{"id": i, "embed": PICKLED_ROWS[form](row)} for i, row in enumerate(values)]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(dicts, protocol))
    found = rows_of(tmp_path / "a.pkl", batch_bytes=200)
    assert found.dtype == ("float64" if form in ("lists", "lists of one list") else "float32")
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_float_dtype(tmp_path, protocol, dtype):
    values = values_of(6, dtype)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([{"id": "x", "embed": row} for row in values], protocol))
    found = rows_of(tmp_path / "a.pkl")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)


def test_pickles_with_other_values_and_names(tmp_path):
    values = values_of(3)
    other = {"id": "ä", "tags": ["a", 1, None, True, 2.5, b"x", {"k": (1, 2)}], "score": np.float32(1), "n": 1 << 70}
    dicts = [{**other, "embedding": row, "vec": 2 * row} for row in values]
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(dicts))
    np.testing.assert_array_equal(rows_of(tmp_path / "a.pickle"), values)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.pickle", column="vec"), 2 * values)
    (chunk,) = open_shard(tmp_path / "a.pickle").chunks(Blocks(10_000, 3), columns=True)
    assert [{key: item[key] for key in other} for item in chunk.columns] == [other] * 3


def test_pickled_rows_that_are_one_object_many_times(tmp_path):
    row = values_of(1)[0]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([{"id": 0, "embed": row}] * 5))
    np.testing.assert_array_equal(rows_of(tmp_path / "a.pkl"), np.stack([row] * 5))


def numbered(folder, write_shard, suffix, names):
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(names):
        write_shard(folder / f"{name}{suffix}", np.full((1, DIM), index + 1, np.float32))
    return folder


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_directories_are_read_in_natural_order(tmp_path, write_shard, suffix):
    names = ["a_1", "a_2", "a_10", "a_010b", "b_9_2", "b_9_10", "b_10_1"]
    folder = numbered(tmp_path / "d", write_shard, suffix, names)
    np.testing.assert_array_equal(rows_of(folder)[:, 0], [1, 2, 3, 4, 5, 6, 7])


def test_globs_are_read_in_natural_order(tmp_path, write_shard):
    numbered(tmp_path / "d", write_shard, ".npy", ["a_1", "a_2", "a_10", "b_1"])
    np.testing.assert_array_equal(rows_of(str(tmp_path / "d" / "a_*.npy"))[:, 0], [1, 2, 3])
    np.testing.assert_array_equal(rows_of(str(tmp_path / "**" / "?_1.npy"))[:, 0], [1, 4])


def test_lists_of_paths_keep_their_order(tmp_path, write_shard):
    folder = numbered(tmp_path / "d", write_shard, ".npy", ["a", "b", "c"])
    source = open_source([folder / "c.npy", str(folder / "a.npy"), folder], name="text")
    assert [batch.rows.values[0, 0] for batch in source.batches()] == [3, 1, 1, 2, 3]


def test_a_path_with_the_signs_of_a_glob_is_taken_as_it_is(tmp_path, write_shard):
    folder = numbered(tmp_path / "d[12]", write_shard, ".npy", ["a*", "a_2"])
    np.testing.assert_array_equal(rows_of(folder / "a*.npy")[:, 0], [1])
    np.testing.assert_array_equal(rows_of(folder)[:, 0], [1, 2])


def test_hidden_files_manifests_sidecars_and_other_files_are_left_out(tmp_path, write_shard):
    folder = numbered(tmp_path / "d", write_shard, ".npy", ["a", "b"])
    for name in (".hidden.npy", "realign-manifest.json", "notes.txt", "a.columns.parquet"):
        shutil.copy(folder / "b.npy", folder / name)
    (folder / "sub.npy").mkdir()
    np.testing.assert_array_equal(rows_of(folder)[:, 0], [1, 2])
    np.testing.assert_array_equal(rows_of(str(folder / "*"))[:, 0], [1, 2])


def test_a_table_whose_name_only_looks_like_a_sidecar_is_read(tmp_path, write_shard):
    folder = numbered(tmp_path / "d", write_shard, ".parquet", ["a.columns", "b"])
    np.testing.assert_array_equal(rows_of(folder)[:, 0], [1, 2])


def test_formats_may_be_mixed_and_suffixes_are_read_in_any_case(tmp_path, write_shard):
    for index, suffix in enumerate(SUFFIXES):
        path = write_shard(tmp_path / f"{index}{suffix}", np.full((2, DIM), index + 1, np.float32))
        path.rename(path.with_suffix(suffix.upper()))
    np.testing.assert_array_equal(rows_of(tmp_path, batch_bytes=60)[:, 0], np.repeat([1, 2, 3, 4, 5, 6], 2))


def test_the_fingerprint_follows_content_and_order(tmp_path, write_shard):
    a, b = (write_shard(tmp_path / f"{name}.npy", values_of(5, seed=seed)) for seed, name in enumerate("ab"))
    first = open_source([a, b], name="text").fingerprint()
    assert first == open_source(tmp_path, name="text").fingerprint()
    assert first != open_source([b, a], name="text").fingerprint()
    write_shard(b, values_of(5, seed=9))
    assert first != open_source([a, b], name="text").fingerprint()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_a_file_is_read_by_any_number_of_threads(tmp_path, num_threads):
    data = np.random.default_rng(0).bytes(9_000_001)
    (tmp_path / "a").write_bytes(data)
    with (tmp_path / "a").open("rb") as file:
        for offset, size in [(0, len(data)), (4097, 5_000_000), (len(data) - 10, 10), (7, 0)]:
            buffer = bytearray(size)
            assert _C.read_file(file.fileno(), buffer, offset, num_threads) == size
            assert buffer == data[offset : offset + size]
        assert _C.read_file(file.fileno(), bytearray(8_000_000), 2_000_000, num_threads) == 7_000_001
        assert _C.read_file(file.fileno(), bytearray(10), len(data), num_threads) == 0
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(IsADirectoryError):
        _C.read_file(folder, bytearray(10), 0, num_threads)
    os.close(folder)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _C.read_file(-1, bytearray(5_000_000), 0, num_threads)


def test_every_known_suffix_is_tested_here():
    assert {*SUFFIXES, ".pickle"} == set(FORMATS)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("columns", [False, True])
def test_arrow_rows_are_read_where_they_lie_unless_compressed(tmp_path, compression, columns):
    values = values_of(40)
    table = pa.table({"n": range(40), "embedding": lists_of(values, "fixed_size_list")})
    save_table(tmp_path / "a.arrow", table, options=pa.ipc.IpcWriteOptions(compression=compression))
    shard = open_shard(tmp_path / "a.arrow")
    assert shard.decoded is (compression is not None)
    found = [chunk.rows.values.copy() for chunk in shard.chunks(Blocks(10 * 4 * DIM, 3), columns=columns)]
    assert len(found) > 1
    np.testing.assert_array_equal(np.concatenate(found), values)


def test_a_bad_row_of_a_file_that_has_been_read_ahead_is_located(tmp_path, write_shard):
    values = values_of(30)
    values[29, 0] = np.nan
    write_shard(tmp_path / "a.npy", values)
    write_shard(tmp_path / "b.parquet", values_of(30, seed=1))
    with pytest.raises(ValueError, match=r"a\.npy: row 29"):
        gather_moments(tmp_path)
