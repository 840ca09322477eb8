import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import save_file as save_tensors

import realign_fast as rf
from realign_fast._dtypes import to_float64
from realign_fast._transform import Steps, transform_rows
from realign_fast.alignment import apply_files
from realign_fast.io import _sink
from realign_fast.io._raw import Blocks
from realign_fast.io.formats import open_shard
from realign_fast.io.sources import open_source
from realign_fast.io.writer import convert, rewrite, verify

DIM = 16
MANIFEST = "realign-manifest.json"
SUFFIXES = {"npy": ".npy", "parquet": ".parquet", "arrow": ".arrow", "safetensors": ".safetensors", "pickle": ".pkl"}
SOURCES = SUFFIXES | {"tar": ".tar"}


def values_of(count=50, dtype="float32", seed=0, dim=DIM):
    return np.random.default_rng(seed).normal(1, 1, size=(count, dim)).astype(dtype)


def ids_of(count):
    return [f"row-{i}-ä" for i in range(count)]


@pytest.fixture(scope="module")
def alignment():
    return rf.fit(values_of(400, seed=10), values_of(400, seed=11) - 1.5)


@pytest.fixture
def folder(tmp_path, write_shard):
    """Three small npy files of unequal length."""
    (tmp_path / "in").mkdir()
    for index, count in enumerate([40, 1, 25]):
        write_shard(tmp_path / "in" / f"part_{index}.npy", values_of(count, seed=index))
    return tmp_path / "in"


def rows_of(path, column=None):
    source = open_source(path, name="text", column=column)
    return np.concatenate([to_float64(batch.rows) for batch in source.batches()])


def ids_in(path):
    match path.suffix:
        case ".parquet":
            return parquet.read_table(path)["id"].to_pylist()
        case ".arrow":
            return pa.ipc.open_file(path).read_all()["id"].to_pylist()
        case ".pkl":
            return [item["id"] for item in pickle.loads(path.read_bytes())]
        case ".tar":
            with tarfile.open(path) as tar:
                return [name.removesuffix(".npy") for name in tar.getnames()]


def hashes(folder):
    """What every file of a folder holds, hidden ones too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def manifest_of(folder):
    return json.loads((folder / MANIFEST).read_text())


def edit_manifest(folder, edit):
    manifest = manifest_of(folder)
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


# What is kept


@pytest.mark.parametrize("suffix", SOURCES.values())
def test_apply_keeps_names_order_and_ids(tmp_path, write_shard, alignment, suffix):
    values = values_of(120)
    (tmp_path / "in").mkdir()
    names = [f"part_{index}{suffix}" for index in (2, 10, 1)]
    for name, part in zip(names, np.array_split(values, 3), strict=True):
        write_shard(tmp_path / "in" / name, part, ids_of(len(part)))
    summary = apply_files(alignment, tmp_path / "in", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, MANIFEST}
    for name, part in zip(names, np.array_split(values, 3), strict=True):
        np.testing.assert_array_equal(rows_of(tmp_path / "out" / name), alignment.transform(part))
        assert ids_in(tmp_path / "out" / name) in (None, ids_of(len(part)))
    assert (summary["files"], summary["rows"], summary["skipped_files"], summary["bad_rows"]) == (3, 120, 0, 0)
    assert verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize("suffix", SOURCES.values())
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_apply_writes_the_dtype_asked_for(tmp_path, write_shard, alignment, suffix, dtype):
    path = write_shard(tmp_path / f"a{suffix}", values_of())
    apply_files(alignment, path, tmp_path / "out", dtype=dtype)
    assert open_source(tmp_path / "out" / path.name, name="text").dtype == dtype
    np.testing.assert_array_equal(rows_of(tmp_path / "out" / path.name), alignment.transform(values_of(), dtype=dtype))
    assert verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), DIM)])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables_keep_columns_types_order_and_metadata(tmp_path, alignment, suffix, kind):
    values = values_of()
    fields = [
        pa.field("id", pa.string(), metadata={"a": "b"}), pa.field("embedding", kind), pa.field("n", pa.int16()),
        pa.field("day", pa.date32()), pa.field("tags", pa.list_(pa.string())),
        pa.field("s", pa.struct({"x": pa.int8()})),
        pa.field("word", pa.dictionary(pa.int8(), pa.string())), pa.field("none", pa.null()),
    ]  # fmt: skip
    schema = pa.schema(fields, metadata={"origin": "test"})
    count = len(values)
    columns = [
        ids_of(count), list(values), range(count), [3, None] * (count // 2), [["x"], None] * (count // 2),
        [{"x": 1}] * count, ["u", "v"] * (count // 2), [None] * count,
    ]  # fmt: skip
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, fields, strict=True)], schema=schema)
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=9)
    else:
        with pa.ipc.new_file(path, schema) as writer:
            writer.write_table(table, 9)
    apply_files(alignment, path, tmp_path / "out")
    out = tmp_path / "out" / path.name
    found = parquet.read_table(out) if suffix == ".parquet" else pa.ipc.open_file(out).read_all()
    stored = parquet.read_table(path) if suffix == ".parquet" else table
    assert found.schema.equals(stored.schema, check_metadata=True)
    assert found.drop_columns("embedding") == stored.drop_columns("embedding")
    np.testing.assert_array_equal(rows_of(out), alignment.transform(values))


def test_arrow_streams_stay_streams(tmp_path, alignment):
    table = pa.table({"id": ids_of(50), "embedding": pa.array(list(values_of()))})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    apply_files(alignment, tmp_path / "a.arrow", tmp_path / "out")
    found = pa.ipc.open_stream(tmp_path / "out" / "a.arrow").read_all()
    assert found["id"] == table["id"]


def test_safetensors_keep_other_tensors_and_metadata(tmp_path, alignment):
    values = torch.from_numpy(values_of())
    others = {"z": torch.arange(7), "a": torch.ones(3, 3, 3, dtype=torch.float16), "flag": torch.tensor(True)}
    save_tensors({**others, "m": values}, tmp_path / "a.safetensors", metadata={"origin": "test"})
    apply_files(alignment, tmp_path / "a.safetensors", tmp_path / "out", column="m")
    with safe_open(tmp_path / "out" / "a.safetensors", "pt") as file:
        assert file.metadata() == {"origin": "test"}
        assert set(file.keys()) == {*others, "m"}
        assert all(torch.equal(file.get_tensor(name), other) for name, other in others.items())
        np.testing.assert_array_equal(file.get_tensor("m").numpy(), alignment.transform(values.numpy()))


def test_safetensors_of_bfloat16_stay_bfloat16(tmp_path, alignment):
    values = torch.from_numpy(values_of()).bfloat16()
    save_tensors({"embedding": values}, tmp_path / "a.safetensors")
    apply_files(alignment, tmp_path / "a.safetensors", tmp_path / "out")
    with safe_open(tmp_path / "out" / "a.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("embedding"), alignment.transform(values))


def test_bfloat16_becomes_float32_where_the_format_has_none(tmp_path):
    values = torch.from_numpy(values_of()).bfloat16()
    save_tensors({"embedding": values}, tmp_path / "a.safetensors")
    summary = convert(tmp_path / "a.safetensors", tmp_path / "out", format="npy")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "a.npy"), values.float().numpy())
    assert "bfloat16 became float32" in summary["notes"][0]


def test_pickles_keep_keys_and_the_shape_of_arrays(tmp_path, alignment):
    values = values_of()
    dicts = [{"n": i, "embed": row[None], "tags": [b"a", None, {"x": 1.5}]} for i, row in enumerate(values)]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(dicts))
    apply_files(alignment, tmp_path / "a.pkl", tmp_path / "out")
    found = pickle.loads((tmp_path / "out" / "a.pkl").read_bytes())
    assert [list(item) for item in found] == [["n", "embed", "tags"]] * 50
    assert [(item["n"], item["tags"]) for item in found] == [(item["n"], item["tags"]) for item in dicts]
    np.testing.assert_array_equal(np.stack([item["embed"] for item in found])[:, 0], alignment.transform(values))


@pytest.mark.parametrize("suffix", SOURCES.values())
def test_files_without_rows_are_written_without_rows(tmp_path, write_shard, alignment, suffix):
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / f"a{suffix}", values_of(0))
    write_shard(tmp_path / "in" / f"b{suffix}", values_of(3))
    apply_files(alignment, tmp_path / "in", tmp_path / "out")
    chunks = open_shard(tmp_path / "out" / f"a{suffix}").chunks(Blocks(100, 3))
    assert sum(len(chunk.rows.values) for chunk in chunks) == 0
    assert verify(tmp_path / "out")["ok"]


def test_bad_rows_become_zeros_where_asked_and_are_counted(tmp_path, alignment):
    values = values_of()
    values[[3, 9]] = np.nan
    np.save(tmp_path / "a.npy", values)
    summary = apply_files(alignment, tmp_path / "a.npy", tmp_path / "out", on_bad_rows="zero")
    assert summary["bad_rows"] == 2
    assert manifest_of(tmp_path / "out")["files"][0]["bad_rows"] == 2
    assert not np.load(tmp_path / "out" / "a.npy")[[3, 9]].any()
    assert verify(tmp_path / "out")["ok"]


def test_a_bad_row_stops_the_job_and_leaves_what_is_finished(folder, alignment):
    values = values_of(25)
    values[20] = np.inf
    np.save(folder / "part_2.npy", values)
    out = folder.parent / "out"
    with pytest.raises(ValueError, match=r"part_2\.npy: row 20 is bad"):
        apply_files(alignment, folder, out)
    assert not (out / "part_2.npy").exists()
    assert not list(out.glob(".*tmp*"))
    assert verify(out)["ok"] is False


def mapped_by(alignment):
    return lambda rows, out, num_threads, number: transform_rows(Steps.of(alignment.parameters), rows, out, num_threads)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet", ".tar"])
def test_any_number_of_threads_writes_the_same_bytes(tmp_path, write_shard, alignment, suffix, num_threads):
    (tmp_path / "in").mkdir()
    for index in range(11):
        write_shard(tmp_path / "in" / f"part_{index}{suffix}", values_of(50 + index, seed=index), ids_of(50 + index))
    advanced = []
    for out, threads in (("out", num_threads), ("alone", 1)):
        job = {"alignment": alignment.fingerprint}
        rewrite(
            sorted((tmp_path / "in").iterdir()),
            tmp_path / out,
            transform=mapped_by(alignment),
            job=job,
            num_threads=threads,
            progress=lambda num_rows, initial: nullcontext(advanced.append),
        )
    assert sum(advanced) == 2 * sum(range(50, 61))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("bad", [[3], [1, 2], [0, 5, 9], [9]])
def test_the_first_file_that_fails_is_named_and_those_before_it_are_finished(tmp_path, alignment, num_threads, bad):
    (tmp_path / "in").mkdir()
    for index in range(10):
        values = values_of(200)
        if index in bad:  # the first of them fails last
            values[-1 if index == bad[0] else 0] = 0
        np.save(tmp_path / "in" / f"part_{index}.npy", values)
    with pytest.raises(ValueError, match=rf"part_{bad[0]}\.npy: row 199 is bad"):
        apply_files(alignment, tmp_path / "in", tmp_path / "out", num_threads=num_threads)
    names = {path.name for path in (tmp_path / "out").glob("[!.]*")}
    assert {f"part_{index}.npy" for index in range(bad[0])} <= names
    assert not names & {f"part_{index}.npy" for index in bad}
    assert not [path for path in (tmp_path / "out").iterdir() if ".tmp-" in path.name]


def test_an_interrupt_stops_every_lane_and_leaves_a_job_to_resume(tmp_path, write_shard, alignment):
    (tmp_path / "in").mkdir()
    for index in range(6):
        write_shard(tmp_path / "in" / f"part_{index}.npy", values_of(500, seed=index))
    apply_files(alignment, tmp_path / "in", tmp_path / "whole")

    def transform(rows, out, num_threads, number):
        if not interrupted.is_set():
            interrupted.set()
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)  # the main thread sees it
        return mapped_by(alignment)(rows, out, num_threads, number)

    interrupted = threading.Event()
    paths, job = sorted((tmp_path / "in").iterdir()), {"any": "job"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background may lack
    try:
        with pytest.raises(KeyboardInterrupt):
            rewrite(paths, tmp_path / "out", transform=transform, job=job, num_threads=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert not [path for path in (tmp_path / "out").iterdir() if ".tmp-" in path.name]
    rewrite(paths, tmp_path / "out", transform=transform, job=job, num_threads=2, resume=True)
    for path in paths:
        assert (tmp_path / "out" / path.name).read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_several_blocks_of_one_file_come_out_in_order(tmp_path, alignment):
    values = values_of(300_000)
    np.save(tmp_path / "a.npy", values)
    apply_files(alignment, tmp_path / "a.npy", tmp_path / "out")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "a.npy"), alignment.transform(values))


@pytest.mark.parametrize("suffix", SOURCES.values())
def test_the_same_input_gives_the_same_bytes(tmp_path, write_shard, alignment, suffix):
    path = write_shard(tmp_path / f"a{suffix}", values_of(), ids_of(50))
    for out in ("x", "y"):
        apply_files(alignment, path, tmp_path / out, num_threads=1 + (out == "x"))
    assert hashes(tmp_path / "x") == hashes(tmp_path / "y")


# Conversion


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_format_becomes_every_other(tmp_path, write_shard, source, target, dtype):
    values = values_of(dtype=dtype)
    path = write_shard(tmp_path / f"a{SOURCES[source]}", values, ids_of(50))
    summary = convert(path, tmp_path / "out", format=target)
    out = tmp_path / "out" / f"a{SUFFIXES[target]}"
    found = open_source(tmp_path / "out", name="text")
    assert (found.dtype, found.dim) == (dtype, DIM)
    np.testing.assert_array_equal(rows_of(out), values)
    assert summary["notes"] == []
    assert verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize("source", ["parquet", "arrow", "pickle", "tar"])
def test_ids_go_along_or_beside(tmp_path, write_shard, source, target):
    path = write_shard(tmp_path / f"a{SOURCES[source]}", values_of(), ids_of(50))
    convert(path, tmp_path / "out", format=target)
    beside = ".parquet" if source == "tar" else SOURCES[source]
    holder = f"a{SUFFIXES[target]}" if target not in ("npy", "safetensors") else f"a.columns{beside}"
    assert ids_in(tmp_path / "out" / holder) == ids_of(50)


@pytest.mark.parametrize("middle", ["parquet", "arrow", "pickle"])
@pytest.mark.parametrize("source", ["parquet", "arrow", "pickle"])
def test_values_and_ids_survive_there_and_back(tmp_path, write_shard, source, middle):
    path = write_shard(tmp_path / f"a{SUFFIXES[source]}", values_of(), ids_of(50))
    convert(path, tmp_path / "middle", format=middle)
    convert(tmp_path / "middle", tmp_path / "back", format=source)
    np.testing.assert_array_equal(rows_of(tmp_path / "back" / path.name), values_of())
    assert ids_in(tmp_path / "back" / path.name) == ids_of(50)


def test_bad_rows_are_converted_as_they_are(tmp_path):
    values = values_of()
    values[3], values[4], values[5, 1] = 0, np.nan, -np.inf
    np.save(tmp_path / "a.npy", values)
    convert(tmp_path / "a.npy", tmp_path / "out", format="parquet")
    np.testing.assert_array_equal(rows_of(tmp_path / "out"), values)
    assert verify(tmp_path / "out")["ok"]


def test_other_tensors_go_beside_a_converted_file(tmp_path):
    save_tensors({"embedding": torch.ones(3, DIM), "z": torch.arange(7)}, tmp_path / "a.safetensors", {"k": "v"})
    convert(tmp_path / "a.safetensors", tmp_path / "out", format="npy")
    with safe_open(tmp_path / "out" / "a.columns.safetensors", "pt") as file:
        assert list(file.keys()) == ["z"]
        assert file.metadata() == {"k": "v"}
    assert rows_of(tmp_path / "out").shape == (3, DIM)


def test_a_column_that_no_pickle_can_hold_plainly_is_refused(tmp_path):
    table = pa.table({"day": pa.array([1], pa.date32()), "embedding": [[1.0, 2.0]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'day' of type date32"):
        convert(tmp_path / "a.parquet", tmp_path / "out", format="pickle")


def test_ids_of_another_name_are_renamed_and_clashes_refused(tmp_path):
    rows = {"key": ["a", "b"], "embedding": [[1.0], [2.0]]}
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    convert(tmp_path / "a.parquet", tmp_path / "out", format="pickle", id_column="key")
    assert ids_in(tmp_path / "out" / "a.pkl") == ["a", "b"]
    parquet.write_table(pa.table({**rows, "id": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="choose another id_column"):
        convert(tmp_path / "a.parquet", tmp_path / "out2", format="pickle", id_column="key")


def test_two_inputs_of_one_output_name_are_refused(tmp_path, write_shard):
    paths = [write_shard(tmp_path / f"a{suffix}", values_of()) for suffix in (".npy", ".safetensors")]
    with pytest.raises(ValueError, match=r"would both be written as .*a\.parquet"):
        convert(paths, tmp_path / "out", format="parquet")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "format must be same, npy"),
        ({"dtype": "bfloat16"}, "only safetensors holds bfloat16"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"on_bad_rows": "skip"}, "on_bad_rows must be one of raise, zero"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, alignment, options, message):
    with pytest.raises(ValueError, match=message):
        apply_files(alignment, folder, folder.parent / "out", **options)
    assert not (folder.parent / "out").exists()


def test_files_of_another_dimension_are_refused(tmp_path, write_shard, alignment):
    write_shard(tmp_path / "a.npy", values_of(dim=5))
    with pytest.raises(ValueError, match=r"a\.npy: rows have dimension 5, the alignment has 16"):
        apply_files(alignment, tmp_path / "a.npy", tmp_path / "out")


# The manifest


def test_the_manifest_states_what_was_asked_and_written(folder, alignment):
    out = folder.parent / "out"
    apply_files(alignment, folder, out, dtype="float16")
    manifest = manifest_of(out)
    assert (manifest["format"], manifest["package"]) == (1, rf.__version__)
    assert manifest["job"] == {
        "alignment": alignment.fingerprint, "side": "source", "on_bad_rows": "raise", "dtype": "float16",
        "format": "same", "column": None, "id_column": "id", "unit_norm": True,
    }  # fmt: skip
    names = [f"part_{index}.npy" for index in range(3)]
    assert [item["name"] for item in manifest["inputs"]] == names
    assert len({item["fingerprint"] for item in manifest["inputs"]}) == 3
    for name, count, entry in zip(names, [40, 1, 25], manifest["files"], strict=True):
        data = (out / name).read_bytes()
        assert entry == {
            "name": name, "input": name, "rows": count, "dim": DIM, "dtype": "float16", "column": None,
            "size": len(data), "xxh64": xxhash.xxh64_hexdigest(data), "bad_rows": 0, "sidecar": None, "ids": None,
        }  # fmt: skip


def test_the_manifest_states_sidecars(tmp_path, write_shard):
    convert(write_shard(tmp_path / "a.parquet", values_of(), ids_of(50)), tmp_path / "out", format="npy")
    (entry,) = manifest_of(tmp_path / "out")["files"]
    data = (tmp_path / "out" / "a.columns.parquet").read_bytes()
    expected = {"name": "a.columns.parquet", "size": len(data), "xxh64": xxhash.xxh64_hexdigest(data)}
    assert entry["sidecar"] == expected


# Output folders


def test_an_output_folder_that_is_not_empty_is_refused(folder, alignment):
    out = folder.parent / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out is not empty: pass resume"):
        apply_files(alignment, folder, out)
    with pytest.raises(FileExistsError, match="holds no job to resume"):
        apply_files(alignment, folder, out, resume=True)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_an_output_that_is_a_file_is_refused(folder, alignment):
    with pytest.raises(NotADirectoryError):
        apply_files(alignment, folder, folder / "part_0.npy")


def test_overwriting_replaces_the_old_job_and_nothing_else(folder, alignment):
    out = folder.parent / "out"
    convert(folder, out, format="safetensors")
    (out / "notes.txt").write_text("mine")
    apply_files(alignment, folder, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {f"part_{i}.npy" for i in range(3)} | {MANIFEST, "notes.txt"}
    np.testing.assert_array_equal(np.load(out / "part_0.npy"), alignment.transform(values_of(40)))
    assert verify(out)["problems"] == ["notes.txt is in no manifest"]


@pytest.mark.parametrize("place", ["in", "in/../in", ".", "link"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_the_folder_of_the_input_or_one_above_it_is_no_output(folder, alignment, place, options):
    (folder.parent / "link").symlink_to(folder)
    before = hashes(folder)
    with pytest.raises(ValueError, match=r"is the folder of the input .* or lies above it"):
        apply_files(alignment, folder, folder.parent / place, **options)
    assert hashes(folder) == before


def test_inputs_that_are_links_into_the_output_are_refused(folder, alignment):
    links = folder.parent / "links"
    links.mkdir()
    (links / "part_0.npy").symlink_to(folder / "part_0.npy")
    with pytest.raises(ValueError, match="is the folder of the input"):
        apply_files(alignment, links, folder, overwrite=True)


def test_an_output_below_the_input_is_allowed(folder, alignment):
    apply_files(alignment, folder, folder / "out")
    assert verify(folder / "out")["ok"]


# Resuming


def test_resuming_a_finished_job_does_nothing(folder, alignment):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("part*")}
    summary = apply_files(alignment, folder, out, resume=True)
    assert (summary["files"], summary["skipped_files"]) == (3, 3)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("part*")}


def test_resuming_makes_what_is_missing_or_of_another_size(folder, alignment):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    before = hashes(out)
    (out / "part_0.npy").unlink()
    os.truncate(out / "part_2.npy", 100)
    assert apply_files(alignment, folder, out, resume=True)["skipped_files"] == 1
    assert hashes(out) == before


def test_resuming_in_an_empty_or_missing_folder_begins(folder, alignment):
    out = folder.parent / "out"
    assert apply_files(alignment, folder, out, resume=True)["files"] == 3


def change_content(folder):
    values = values_of(40, seed=77)
    np.save(folder / "part_0.npy", values)


CHANGES = {
    "content": (change_content, r"the input part_0\.npy has changed"),
    "time": (lambda folder: os.utime(folder / "part_1.npy", (1, 1)), r"the input part_1\.npy has changed"),
    "one more": (lambda f: shutil.copy(f / "part_0.npy", f / "part_3.npy"), r"the input part_3\.npy is new"),
    "one less": (lambda folder: (folder / "part_0.npy").unlink(), r"the input part_0\.npy is gone"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_with_other_inputs_is_refused(folder, alignment, change):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    before = hashes(out)
    CHANGES[change][0](folder)
    with pytest.raises(ValueError, match=CHANGES[change][1]):
        apply_files(alignment, folder, out, resume=True)
    assert hashes(out) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype was None, now it is 'float16'"),
        ({"side": "target"}, "side was 'source', now it is 'target'"),
        ({"format": "parquet"}, "format was 'same', now it is 'parquet'"),
        ({"on_bad_rows": "zero"}, "on_bad_rows was 'raise', now it is 'zero'"),
        ({"column": "x"}, "column was None, now it is 'x'"),
    ],
)
def test_resuming_another_job_is_refused(folder, alignment, options, message):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    with pytest.raises(ValueError, match=message):
        apply_files(alignment, folder, out, resume=True, **options)


def test_resuming_with_another_alignment_is_refused(folder, alignment):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    other = rf.fit(values_of(400, seed=10), values_of(400, seed=12))
    with pytest.raises(ValueError, match=r"alignment was '.*', now it is '.*'"):
        apply_files(other, folder, out, resume=True)


APPLY = """
import sys
import realign_fast as rf
from realign_fast.alignment import apply_files
apply_files(rf.Alignment.load(sys.argv[1]), sys.argv[2], sys.argv[3], resume=True, num_threads=1)
"""


def start(alignment_path, source, out):
    return subprocess.Popen([sys.executable, "-c", APPLY, alignment_path, source, out], stderr=subprocess.PIPE)


def finish(process):
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error.decode()


@pytest.fixture(scope="module")
def job(tmp_path_factory, alignment, write_shard):
    """Files of every format, an alignment on disk, and what an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("job")
    alignment.save(folder / "a.safetensors")
    (folder / "in").mkdir()
    for index in range(30):
        suffix = list(SUFFIXES.values())[index % 5]
        write_shard(
            folder / "in" / f"part_{index}{suffix}", values_of(20_000 if suffix != ".pkl" else 1500, seed=index)
        )
    began = time.monotonic()
    finish(start(folder / "a.safetensors", folder / "in", folder / "undisturbed"))
    return folder, hashes(folder / "undisturbed"), time.monotonic() - began


def wait_for_files(process, out, count):
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if out.exists() and sum(not path.name.startswith(".") for path in out.iterdir()) >= count:
            return
        time.sleep(0.0005)


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_job_goes_on_to_the_same_bytes(tmp_path, job, seed):
    folder, expected, _ = job
    rng = random.Random(seed)
    out = tmp_path / "out"
    for least in sorted(rng.sample(range(29), 2)):
        process = start(folder / "a.safetensors", folder / "in", out)
        wait_for_files(process, out, least)
        time.sleep(rng.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL and out.exists():
            for path in out.glob("part_*"):  # a name is only given to whole files
                assert hashlib.sha256(path.read_bytes()).hexdigest() == expected[path.name]
    finish(start(folder / "a.safetensors", folder / "in", out))
    assert hashes(out) == expected
    assert verify(out)["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_a_job_killed_at_any_time_goes_on_to_the_same_bytes(tmp_path, job, seed):
    folder, expected, seconds = job
    rng = random.Random(seed)
    for _ in range(3):
        process = start(folder / "a.safetensors", folder / "in", tmp_path / "out")
        time.sleep(rng.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(folder / "a.safetensors", folder / "in", tmp_path / "out"))
    assert hashes(tmp_path / "out") == expected


def test_a_job_stopped_before_any_file_is_begun_again_without_resume(folder, alignment):
    out = folder.parent / "out"
    out.mkdir()
    (out / ".part_0.npy.tmp-0123abcd").write_bytes(b"half")
    apply_files(alignment, folder, out)
    assert verify(out)["ok"]
    assert not list(out.glob(".*"))


def test_a_torn_line_of_the_journal_only_costs_its_file(folder, alignment, monkeypatch):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    expected = hashes(out)
    manifest = manifest_of(out)
    files = manifest.pop("files")
    (out / MANIFEST).unlink()
    lines = [json.dumps(line) for line in ({**manifest, "former": []}, *files)]
    (out / ".realign-journal").write_text("\n".join(lines)[:-20])
    assert apply_files(alignment, folder, out, resume=True)["skipped_files"] == 2
    assert hashes(out) == expected


# Full disks


def disk_of(monkeypatch, num_bytes):
    """`os.write` writes part of what is asked and then raises ENOSPC once `num_bytes` have been written."""
    left, lock = [num_bytes], threading.Lock()

    class Os:
        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, fd, data):
            with lock:
                if not left[0]:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                count = os.write(fd, data[: min(left[0], 1000)])
                left[0] -= count
            return count

    monkeypatch.setattr(_sink, "os", Os())


@pytest.mark.parametrize("num_bytes", [0, 100, 5000, 30_000, 90_000])
@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_a_full_disk_leaves_whole_files_only_and_the_job_goes_on(
    tmp_path, write_shard, alignment, monkeypatch, suffix, num_bytes
):
    (tmp_path / "in").mkdir()
    for index in range(4):
        write_shard(tmp_path / "in" / f"part_{index}{suffix}", values_of(500, seed=index), ids_of(500))
    apply_files(alignment, tmp_path / "in", tmp_path / "undisturbed")
    expected = hashes(tmp_path / "undisturbed")
    out = tmp_path / "out"
    disk_of(monkeypatch, num_bytes)
    with pytest.raises(OSError, match=rf"No space left on device.*part_\d\{suffix}") as caught:
        apply_files(alignment, tmp_path / "in", out)
    assert caught.value.errno == errno.ENOSPC
    assert not list(out.glob(".*tmp*"))
    for path in out.glob("part_*"):
        assert hashes(out)[path.name] == expected[path.name]
    monkeypatch.undo()
    apply_files(alignment, tmp_path / "in", out, resume=True)
    assert hashes(out) == expected


def test_a_limit_on_the_size_of_files_is_reported_and_the_job_goes_on(tmp_path, alignment):
    (tmp_path / "in").mkdir()
    for index, count in enumerate([100, 100_000]):
        np.save(tmp_path / "in" / f"part_{index}.npy", values_of(count))
    alignment.save(tmp_path / "a.safetensors")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    arguments = [tmp_path / "a.safetensors", tmp_path / "in", tmp_path / "out"]
    result = subprocess.run([sys.executable, "-c", limit + APPLY, *arguments], capture_output=True, text=True)
    assert result.returncode == 1
    assert "OSError: [Errno 27] File too large" in result.stderr
    assert "part_1.npy" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"part_0.npy", ".realign-journal"}
    finish(start(*arguments))
    assert verify(tmp_path / "out")["ok"]


def test_a_job_that_cannot_fit_is_refused_before_it_begins(folder, alignment, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(OSError, match=r"not enough space: about .* bytes are needed, 5 are free"):
        apply_files(alignment, folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


# Hostile manifests


BAD_NAMES = ["../in/part_0.npy", "/etc/passwd", "sub/x.npy", "..", ".", "", ".hidden", "a\0b", MANIFEST, None, 7]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("act", ["verify", "resume", "overwrite"])
@pytest.mark.parametrize("place", ["file", "sidecar"])
def test_a_manifest_that_names_what_is_not_in_its_folder_is_refused(folder, alignment, name, act, place):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)

    def edit(manifest):
        entry = manifest["files"][0]
        if place == "file":
            entry["name"] = name
        else:
            entry["sidecar"] = {"name": name, "size": 1, "xxh64": "0"}

    edit_manifest(out, edit)
    before = hashes(folder)
    with pytest.raises(ValueError, match=r"realign-manifest\.json"):
        verify(out) if act == "verify" else apply_files(alignment, folder, out, **{act: True})
    assert hashes(folder) == before


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_journal_that_would_remove_what_is_not_in_its_folder_is_refused(folder, alignment, name):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    head = {key: value for key, value in manifest_of(out).items() if key != "files"}
    (out / ".realign-journal").write_text(json.dumps({**head, "former": [name]}) + "\n")
    for act in ("resume", "overwrite"):
        with pytest.raises(ValueError, match=r"\.realign-journal"):
            apply_files(alignment, folder, out, **{act: True})


@pytest.mark.parametrize("act", ["verify", "resume", "overwrite"])
@pytest.mark.parametrize("link", ["part_0.npy", MANIFEST])
def test_links_in_an_output_folder_are_refused(folder, alignment, act, link):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    outside = (out / link).rename(folder.parent / "outside")
    (out / link).symlink_to(outside)
    before = outside.read_bytes()
    with pytest.raises(ValueError, match="is a link"):
        verify(out) if act == "verify" else apply_files(alignment, folder, out, **{act: True})
    assert outside.read_bytes() == before


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[:-10],
    "a list": lambda text: "[]",
    "nested": lambda text: "[" * 100_000,
    "no files": lambda text: text.replace('"files"', '"flies"'),
    "no inputs": lambda text: text.replace('"inputs"', '"outputs"'),
    "format as text": lambda text: text.replace('"format": 1', '"format": "1"'),
    "rows as text": lambda text: text.replace('"rows": 40', '"rows": "40"'),
    "many digits": lambda text: text.replace('"rows": 40', '"rows": 4' + "0" * 5000),
    "not UTF-8": lambda text: "\udcff" + text,
    "newer": lambda text: text.replace('"format": 1', '"format": 2'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_manifests_are_refused(folder, alignment, damage):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    text = DAMAGES[damage]((out / MANIFEST).read_text())
    (out / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"realign-manifest\.json (is damaged|has format version 2)"):
        verify(out)


# Verifying


def test_verify_counts_what_it_has_checked(folder, alignment):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    seen = []
    size = sum((out / f"part_{index}.npy").stat().st_size for index in range(3))
    assert verify(out, seen.append) == {"ok": True, "problems": [], "files": 3, "rows": 66, "bytes": size}
    assert sum(seen) == 66


@pytest.mark.parametrize("place", [0, 60, 128, 1000, -1])
def test_verify_finds_a_flipped_bit_anywhere(folder, alignment, place):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    data = bytearray((out / "part_0.npy").read_bytes())
    data[place] ^= 1
    (out / "part_0.npy").write_bytes(data)
    (problem,) = verify(out)["problems"]
    assert problem.startswith("part_0.npy has changed: its hash is")


def remove(path):
    path.unlink()


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"x")


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def add_one(path):
    (path.parent / "more.npy").touch()


def add_hidden(path):
    (path.parent / ".more.npy.tmp-0123abcd").touch()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove, "part_0.npy: No such file or directory"),
        (lengthen, "part_0.npy has 2689 bytes, the manifest states 2688"),
        (replace_by_folder, "part_0.npy is no plain file"),
        (replace_by_pipe, "part_0.npy is no plain file"),
        (add_one, "more.npy is in no manifest"),
        (add_hidden, ".more.npy.tmp-0123abcd is in no manifest"),
    ],
)
def test_verify_finds_missing_other_and_extra_files(folder, alignment, harm, message):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    harm(out / "part_0.npy")
    found = verify(out)
    assert not found["ok"]
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith(message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", 41, "part_0.npy has 40 rows, the manifest states 41"),
        ("dim", 15, "part_0.npy has 16 x float32, the manifest states 15 x float32"),
        ("dtype", "float16", "part_0.npy has 16 x float32, the manifest states 16 x float16"),
        ("xxh64", "0", "part_0.npy has changed: its hash is"),
    ],
)
def test_verify_compares_content_and_manifest(folder, alignment, field, value, message):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    edit_manifest(out, lambda manifest: manifest["files"][0].update({field: value}))
    (problem,) = verify(out)["problems"]
    assert problem.startswith(message)


def test_verify_finds_rows_that_are_not_of_length_one(folder):
    out = folder.parent / "out"
    convert(folder, out, format="npy")
    assert verify(out)["ok"]
    edit_manifest(out, lambda manifest: manifest["job"].update(unit_norm=True))
    assert "row 0 has length" in verify(out)["problems"][0]


def test_verify_tells_that_a_job_is_unfinished(folder, alignment):
    out = folder.parent / "out"
    apply_files(alignment, folder, out)
    edit_manifest(out, lambda manifest: manifest["files"].pop())
    (out / "part_2.npy").unlink()
    assert verify(out)["problems"] == ["the job has finished 2 of 3 files: run it again with resume"]


def test_verify_needs_a_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no realign-manifest"):
        verify(Path(tmp_path))
