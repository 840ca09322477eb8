import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

import realign_fast as rf
from realign_fast.alignment import apply_files
from realign_fast.io._raw import Blocks
from realign_fast.io.formats import open_shard
from realign_fast.io.sources import open_source
from realign_fast.io.writer import convert, rewrite, verify

DIM = 64
MANIFEST = "realign-manifest.json"


def cloud(count, seed, dim=DIM):
    rng = np.random.default_rng(seed)
    return (np.random.default_rng(seed % 2).normal(size=dim) + rng.normal(size=(count, dim))).astype(np.float32)


@pytest.fixture(scope="module")
def alignment():
    return rf.fit(cloud(400, 0), cloud(400, 1))


@pytest.fixture
def text(tmp_path):
    """Four npy shards."""
    folder = tmp_path / "text"
    folder.mkdir()
    for shard in range(4):
        np.save(folder / f"part_{shard}.npy", cloud(300, 2 * shard))
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows_of(path):
    return np.concatenate([batch.rows.values.copy() for batch in open_source(path, name="rows").batches()])


def halve(rows, out):
    np.multiply(rows.values, 0.5, out=out.values, casting="unsafe")
    return 0, 0, -1


def halved(paths, out, **options):
    return rewrite(paths, out, transform=halve, job={"test": 1}, unit_norm=False, **options)


# ---- What is kept --------------------------------------------------------------------------------------------------


def test_names_order_and_manifest(tmp_path, text, alignment):
    summary = apply_files(alignment, text, tmp_path / "out")
    assert (summary["files"], summary["rows"], summary["bad_rows"]) == (4, 1200, 0)
    assert sorted(contents(tmp_path / "out")) == [*(f"part_{i}.npy" for i in range(4)), MANIFEST]
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert [item["name"] for item in manifest["inputs"]] == [f"part_{i}.npy" for i in range(4)]
    for entry in manifest["files"]:
        path = tmp_path / "out" / entry["name"]
        assert (entry["rows"], entry["dim"], entry["dtype"]) == (300, DIM, "float32")
        assert entry["size"] == path.stat().st_size
        np.testing.assert_array_equal(np.load(path), alignment.transform(np.load(text / entry["name"])))
    assert verify(tmp_path / "out")["ok"]


def test_equal_jobs_write_equal_bytes(tmp_path, text, alignment):
    for name, threads in (("a", 1), ("b", 3)):
        apply_files(alignment, text, tmp_path / name, num_threads=threads)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed"])
def test_tables_keep_their_other_columns(tmp_path, suffix, kind):
    rows = cloud(50, 0)
    value = pa.float32()
    kinds = {"list": pa.list_(value), "large_list": pa.large_list(value), "fixed": pa.list_(value, DIM)}
    table = pa.table(
        {
            "id": [f"row {i}" for i in range(50)],
            "vector": pa.array(rows.tolist(), type=kinds[kind]),
            "caption": [None if i % 7 == 0 else "a" * i for i in range(50)],
        }
    ).replace_schema_metadata({"made": "here"})
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=20)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=20)
    halved([path], tmp_path / "out", column="vector")
    out = tmp_path / "out" / path.name
    result = pq.read_table(out) if suffix == "parquet" else pa.ipc.open_file(out).read_all()
    assert result.column_names == table.column_names
    assert result.drop(["vector"]).equals(table.drop(["vector"]))
    assert result.schema.metadata[b"made"] == b"here"
    np.testing.assert_array_equal(np.array(result["vector"].to_pylist(), np.float32), rows / 2)
    assert verify(tmp_path / "out")["ok"]


def test_pickles_keep_their_other_keys(tmp_path):
    rows = cloud(30, 0)
    path = tmp_path / "t.pkl"
    path.write_bytes(pickle.dumps([{"id": f"n{i}", "embed": row, "caption": "x" * i} for i, row in enumerate(rows)]))
    halved([path], tmp_path / "out")
    dicts = pickle.loads((tmp_path / "out" / "t.pkl").read_bytes())
    assert [(item["id"], item["caption"]) for item in dicts] == [(f"n{i}", "x" * i) for i in range(30)]
    np.testing.assert_array_equal(np.stack([item["embed"] for item in dicts]), rows / 2)


def test_safetensors_keep_other_tensors_and_metadata(tmp_path):
    rows, ids = cloud(30, 0), np.arange(30)
    save_file({"embedding": rows, "id": ids}, tmp_path / "t.safetensors", {"made": "here"})
    halved([tmp_path / "t.safetensors"], tmp_path / "out")
    np.testing.assert_array_equal(rows_of(tmp_path / "out"), rows / 2)
    kept = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        kept |= load_file(path)
    np.testing.assert_array_equal(kept["id"], ids)
    assert b'"made":"here"' in (tmp_path / "out" / "t.safetensors").read_bytes()


@pytest.mark.parametrize("target", ["npy", "safetensors", "parquet", "arrow", "pickle"])
@pytest.mark.parametrize("source", ["npy", "safetensors", "parquet", "arrow", "pickle"])
def test_every_format_becomes_every_other(tmp_path, source, target):
    rows = cloud(60, 0)
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "part.npy", rows)
    convert(tmp_path / "npy", tmp_path / "first", format=source)
    convert(tmp_path / "first", tmp_path / "second", format=target)
    np.testing.assert_array_equal(rows_of(tmp_path / "second"), rows)
    assert verify(tmp_path / "second")["ok"]


@pytest.mark.parametrize("target", ["npy", "safetensors"])
def test_ids_go_beside_what_cannot_hold_them(tmp_path, target):
    rows = cloud(20, 0)
    table = pa.table({"id": [f"n{i}" for i in range(20)], "embedding": rows.tolist()})
    pq.write_table(table, tmp_path / "t.parquet")
    convert(tmp_path / "t.parquet", tmp_path / "out", format=target)
    assert pq.read_table(tmp_path / "out" / "t.columns.parquet")["id"].to_pylist() == [f"n{i}" for i in range(20)]
    assert len(rows_of(tmp_path / "out")) == 20  # readers of folders leave it out
    assert verify(tmp_path / "out")["ok"]


def test_files_without_rows(tmp_path, text):
    np.save(text / "part_9.npy", np.empty((0, DIM), np.float32))
    assert halved(sorted(text.iterdir()), tmp_path / "out")["rows"] == 1200
    assert np.load(tmp_path / "out" / "part_9.npy").shape == (0, DIM)
    assert verify(tmp_path / "out")["ok"]


# ---- What is refused -----------------------------------------------------------------------------------------------


def test_the_folder_of_the_input_is_refused(tmp_path, text, alignment):
    before = contents(text)
    (tmp_path / "link").symlink_to(text)
    for out in (text, tmp_path, tmp_path / "link", text / ".." / "text"):
        with pytest.raises(ValueError, match="folder of the input"):
            apply_files(alignment, text, out)
    with pytest.raises(ValueError, match="folder of the input"):
        apply_files(alignment, tmp_path / "link", text)
    assert contents(text) == before


def test_names_that_meet_are_refused(tmp_path, text):
    (tmp_path / "more").mkdir()
    np.save(tmp_path / "more" / "part_0.npy", cloud(5, 0))
    with pytest.raises(ValueError, match=r"both be written as part_0\.npy"):
        halved([text / "part_0.npy", tmp_path / "more" / "part_0.npy"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_of_different_dimension_or_dtype_are_refused(tmp_path, text):
    np.save(text / "part_7.npy", cloud(5, 0, dim=DIM + 1))
    with pytest.raises(ValueError, match=r"part_7\.npy has dimension 65"):
        halved(sorted(text.iterdir()), tmp_path / "out")
    np.save(text / "part_7.npy", cloud(5, 0).astype(np.float64))
    with pytest.raises(ValueError, match=r"part_7\.npy has dimension 64 and dtype float64"):
        halved(sorted(text.iterdir()), tmp_path / "out2")


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    paths = sorted(text.iterdir())
    with pytest.raises(FileExistsError, match="not empty"):
        halved(paths, out)
    with pytest.raises(FileExistsError, match="no job to resume"):
        halved(paths, out, resume=True)
    halved(paths, out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "years of work"
    assert verify(out)["problems"] == ["thesis.txt is in no manifest"]


def test_overwriting_removes_what_the_earlier_job_wrote_and_no_more(tmp_path, text):
    halved(sorted(text.iterdir()), tmp_path / "out")
    halved([text / "part_1.npy"], tmp_path / "out", overwrite=True)
    assert sorted(contents(tmp_path / "out")) == ["part_1.npy", MANIFEST]


def test_a_changed_job_is_not_resumed(tmp_path, text, alignment):
    out = tmp_path / "out"
    apply_files(alignment, text, out)
    with pytest.raises(ValueError, match="alignment was"):
        apply_files(rf.fit(cloud(400, 0), cloud(400, 3), method="anchor"), text, out, resume=True)
    with pytest.raises(ValueError, match="dtype was None"):
        apply_files(alignment, text, out, dtype="float16", resume=True)
    np.save(text / "part_2.npy", cloud(300, 8))
    with pytest.raises(ValueError, match=r"the input part_2\.npy has changed"):
        apply_files(alignment, text, out, resume=True)
    (text / "part_2.npy").unlink()
    with pytest.raises(ValueError, match=r"the input part_2\.npy is gone"):
        apply_files(alignment, text, out, resume=True)


@pytest.mark.parametrize(
    "name", ["../text/part_0.npy", "/etc/passwd", "..", "", "a/b.npy", ".hidden", MANIFEST, "nul\0.npy", 7, None]
)
def test_a_manifest_that_points_outside_its_folder_is_refused(tmp_path, text, name):
    out = tmp_path / "out"
    halved(sorted(text.iterdir()), out)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][1]["name"] = name
    (out / MANIFEST).write_text(json.dumps(manifest))
    before = contents(text)
    with pytest.raises(ValueError, match=r"refused|damaged"):
        verify(out)
    for option in ("resume", "overwrite"):
        with pytest.raises(ValueError, match=r"refused|damaged"):
            halved(sorted(text.iterdir()), out, **{option: True})
    assert contents(text) == before


def test_links_in_an_output_folder_are_refused(tmp_path, text):
    out = tmp_path / "out"
    halved(sorted(text.iterdir()), out)
    (out / "part_0.npy").unlink()
    (out / "part_0.npy").symlink_to(text / "part_0.npy")
    with pytest.raises(ValueError, match="which is a link"):
        verify(out)


def test_verify_finds_what_is_wrong(tmp_path, text):
    out = tmp_path / "out"
    halved(sorted(text.iterdir()), out)
    (out / "part_0.npy").unlink()
    data = bytearray((out / "part_1.npy").read_bytes())
    data[500] ^= 4
    (out / "part_1.npy").write_bytes(data)
    with (out / "part_2.npy").open("ab") as file:
        file.write(b"more")
    (out / "extra.npy").write_bytes(b"")
    problems = verify(out)["problems"]
    assert len(problems) == 4
    for problem, start in zip(
        problems, ("part_0.npy: No such", "part_1.npy has changed", "part_2.npy has", "extra.npy"), strict=True
    ):
        assert problem.startswith(start)
    with pytest.raises(FileNotFoundError, match=MANIFEST):
        verify(text)


def test_a_bad_row_is_named_and_finished_files_stay(tmp_path, text, alignment):
    rows = np.load(text / "part_2.npy")
    rows[123] = np.nan
    np.save(text / "part_2.npy", rows)
    with pytest.raises(ValueError, match=r"part_2\.npy.*row 123"):
        apply_files(alignment, text, tmp_path / "out")
    assert not [name for name in contents(tmp_path / "out") if ".tmp" in name]
    rows[123] = 1
    np.save(text / "part_2.npy", rows)
    with pytest.raises(ValueError, match="has changed"):
        apply_files(alignment, text, tmp_path / "out", resume=True)


# ---- A full disk, and death at any moment --------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(tmp_path, text, alignment, monkeypatch):
    apply_files(alignment, text, tmp_path / "whole")
    whole, written, write = contents(tmp_path / "whole"), 0, os.write

    def limited(fd, data):
        nonlocal written
        written += len(data)
        if written > 200_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", limited)
    with pytest.raises(OSError, match=r"No space left on device: '.*part_\d\.npy'"):
        apply_files(alignment, text, tmp_path / "out")
    monkeypatch.undo()
    left = contents(tmp_path / "out")
    assert not [name for name in left if ".tmp" in name]
    assert {name: data for name, data in left.items() if name.endswith(".npy")}.items() <= whole.items()
    apply_files(alignment, text, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == whole


def test_too_little_space_is_seen_before_the_work(tmp_path, text, alignment, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="not enough space: about 30"):
        apply_files(alignment, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


_JOB = """
import sys
from realign_fast.alignment import Alignment, apply_files
alignment = Alignment.load(sys.argv[1])
print("ready", flush=True)
apply_files(alignment, sys.argv[2], sys.argv[3], resume=True, format=sys.argv[4])
"""


@pytest.mark.parametrize("file_format", ["same", "parquet"])
def test_a_killed_job_resumes_to_the_same_bytes(tmp_path, alignment, file_format):
    text = tmp_path / "text"
    text.mkdir()
    for shard in range(12):
        np.save(text / f"part_{shard}.npy", cloud(4000, 2 * shard))
    alignment.save(tmp_path / "a.safetensors")
    apply_files(alignment, text, tmp_path / "whole", format=file_format)
    rng = random.Random(0)
    out = tmp_path / "out"
    command = [sys.executable, "-c", _JOB, tmp_path / "a.safetensors", text, out, file_format]
    killed = 0
    for _ in range(12):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        if out.exists():  # what bears its name is whole
            for path in out.glob("[!.]*.*"):
                assert path.name == MANIFEST or path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert killed > 0
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == contents(tmp_path / "whole")
    assert verify(out)["ok"]


def test_a_torn_journal_is_read_as_far_as_it_goes(tmp_path, text, alignment):
    apply_files(alignment, text, tmp_path / "whole")
    out = tmp_path / "out"

    def fail(done):
        if done:
            raise KeyboardInterrupt

    paths = sorted(text.iterdir())
    job = {"alignment": alignment.fingerprint, "side": "source", "on_bad_rows": "raise"}

    def transform(rows, target):
        return alignment.transform_rows(rows, target)

    with pytest.raises(KeyboardInterrupt):
        rewrite(paths, out, transform=transform, job=job, progress=fail)
    journal = out / ".realign-journal"
    with journal.open("ab") as file:
        file.write(b'{"name": "part_3.npy", "rows"')
    assert not verify(out)["ok"]
    apply_files(alignment, text, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, text):
    shard = open_shard(text / "part_0.npy")
    with (text / "part_0.npy").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=r"part_0\.npy was truncated"):
        list(shard.chunks(Blocks(1 << 20, 3)))
