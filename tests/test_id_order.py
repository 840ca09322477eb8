"""The order of ids: recorded when files are written, and compared when they are verified."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from pyarrow import ipc, parquet

from realign_fast.io import _id_order
from realign_fast.io._id_order import IdOrder
from realign_fast.io.writer import convert, verify

MANIFEST = "realign-manifest.json"
COUNT = 47

IDS = {
    "text": [f"id {i}" for i in range(COUNT)],
    "other letters": ["", "é", "日本", "\0"] + [f"{i}" * i for i in range(COUNT - 4)],
    "integers": list(range(-20, COUNT - 20)),
    "missing text": [None if i % 5 == 3 else str(i) for i in range(COUNT)],
    "missing integers": [None if i % 5 == 3 else i for i in range(COUNT)],
    "large": [(1 << 63) + i for i in range(COUNT)],
}


def hashes_of(ids, step: int) -> list[str]:
    order = IdOrder()
    for start in range(0, len(ids), step):
        order.update(ids[start : start + step])
    return order.hashes()


@pytest.mark.parametrize("kind", IDS)
def test_the_hashes_are_those_of_the_ids_however_they_lie(kind, monkeypatch):
    monkeypatch.setattr(_id_order, "_BLOCK_ROWS", 10)
    ids = IDS[kind]
    expected = hashes_of(ids, COUNT)
    assert len(set(expected)) == 5
    assert [hashes_of(ids[: 10 * (i + 1)], COUNT)[-1] for i in range(5)] == expected
    if kind == "large":
        arrays = [pa.array(ids, pa.uint64())]
    elif "integers" in kind:
        arrays = [pa.array(ids, kind) for kind in (pa.int8(), pa.int64())]
    else:
        arrays = [
            pa.array(ids, kind) for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()))
        ]
    for array in (*arrays, *(pa.concat_arrays([array, array])[COUNT:] for array in arrays)):
        for step in (1, 7, 10, COUNT):
            assert hashes_of(array, step) == expected
    assert hashes_of(ids, 3) == expected


def test_the_hash_is_what_is_written_of_it():
    lengths, text = np.array([1, -1, 3], np.int64).tobytes(), b"abcd"
    both = xxhash.xxh64_hexdigest(lengths) + xxhash.xxh64_hexdigest(text)
    assert hashes_of(["a", None, "bcd"], 3) == [xxhash.xxh64_hexdigest(both.encode())]


@pytest.mark.parametrize(
    ("one", "other"), [(["a", "b"], ["b", "a"]), (["ab", "c"], ["a", "bc"]), ([1, 2], [2, 1]), (["a", None], ["a", ""])]
)
def test_ids_in_another_order_or_cut_otherwise_have_other_hashes(one, other):
    assert hashes_of(one, 2) != hashes_of(other, 2)
    assert hashes_of(pa.array(one), 2) != hashes_of(pa.array(other), 2)


@pytest.mark.parametrize("ids", [[1.5], [True], [b"x"], [("a",)], ["\ud800"], [1 << 70]])
def test_what_are_no_ids_has_no_hashes(ids):
    assert hashes_of(["a", *ids, "b"], 1) is None
    if ids in ([1.5], [True], [b"x"]):
        assert hashes_of(pa.array(ids), 1) is None


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, write_shard) -> Path:
    """Return a folder with a shard of each kind, with ids where it can have them."""
    (tmp_path / "in").mkdir()
    values = np.random.default_rng(0).normal(size=(COUNT, 8)).astype(np.float32)
    for suffix in (".parquet", ".arrow", ".pkl"):
        write_shard(tmp_path / "in" / f"text{suffix}", values, IDS["text"])
        write_shard(tmp_path / "in" / f"integers{suffix}", values, IDS["integers"])
    for suffix in (".npy", ".safetensors", ".parquet"):
        write_shard(tmp_path / "in" / f"none{suffix}", values)
    return tmp_path / "in"


def entries(out: Path) -> dict:
    return {entry["input"]: entry for entry in json.loads((out / MANIFEST).read_text())["files"]}


@pytest.mark.parametrize("form", ["npy", "safetensors", "parquet", "arrow", "pickle"])
def test_every_format_records_the_same_ids_and_is_verified(source, form):
    for path in sorted(source.iterdir()):
        out = source.parent / f"out-{path.name}"
        convert(path, out, format=form)
        ids = entries(out)[path.name]["ids"]
        if path.stem == "none":
            assert ids is None
        else:
            assert ids == {"column": "id", "xxh64": hashes_of(IDS[path.stem], COUNT)}
        assert verify(out)["problems"] == []


def test_another_column_of_ids_is_named_as_it_is_written(tmp_path):
    table = pa.table({"key": IDS["text"], "embedding": pa.array([[1.0, 2.0]] * COUNT, pa.list_(pa.float32(), 2))})
    parquet.write_table(table, tmp_path / "a.parquet")
    for form, name in (("parquet", "key"), ("pickle", "id"), ("npy", "key")):
        convert(tmp_path / "a.parquet", tmp_path / form, format=form, id_column="key")
        assert entries(tmp_path / form)["a.parquet"]["ids"]["column"] == name
        assert verify(tmp_path / form)["ok"]


def harm(path: Path, change) -> None:
    """Change the ids of a table or a pickle."""
    match path.suffix:
        case ".parquet":
            table = parquet.read_table(path)
            parquet.write_table(table.set_column(0, "id", pa.array(change(table["id"].to_pylist()))), path)
        case ".arrow":
            with ipc.open_file(path) as file:
                table = file.read_all()
            with ipc.new_file(path, table.schema) as file:
                file.write_table(table.set_column(0, "id", pa.array(change(table["id"].to_pylist()))))
        case ".pkl":
            dicts = pickle.loads(path.read_bytes())
            ids = change([item["id"] for item in dicts])
            path.write_bytes(pickle.dumps([item | {"id": each} for item, each in zip(dicts, ids, strict=True)]))


def moved(ids):
    return [*ids[:23], ids[24], ids[23], *ids[25:]]


def repeated(ids):
    return [*ids[:24], ids[21], *ids[25:]]


def missing(ids):
    return [*ids[:24], None, *ids[25:]]


@pytest.mark.parametrize("form", ["parquet", "arrow", "pickle", "npy"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [(moved, ""), (repeated, ": row 24 has 'id 21', as row 21 has"), (missing, ": row 24 has none")],
)
def test_ids_that_are_moved_repeated_or_missing_are_found(source, monkeypatch, form, change, reason):
    monkeypatch.setattr(_id_order, "_BLOCK_ROWS", 10)
    out = source.parent / "out"
    convert(source / "text.parquet", out, format=form)
    manifest = json.loads((out / MANIFEST).read_text())
    entry = manifest["files"][0]["sidecar"] or manifest["files"][0]
    path = out / entry["name"]
    harm(path, change)  # as a writer that loses its place would
    entry |= {"size": path.stat().st_size, "xxh64": xxhash.xxh64_hexdigest(path.read_bytes())}
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert verify(out)["problems"] == [
        f"{path.name}: the ids are not those of the input in their order, first in rows 20 to 29{reason}"
    ]


def test_a_sidecar_with_fewer_ids_than_rows_is_found(source):
    out = source.parent / "out"
    convert(source / "text.parquet", out, format="npy")
    path = out / "text.columns.parquet"
    parquet.write_table(parquet.read_table(path).slice(1), path)
    manifest = json.loads((out / MANIFEST).read_text())
    data = path.read_bytes()
    manifest["files"][0]["sidecar"] |= {"size": len(data), "xxh64": xxhash.xxh64_hexdigest(data)}
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert verify(out)["problems"] == [f"text.columns.parquet has {COUNT - 1} ids, the manifest states {COUNT} rows"]


def test_manifests_of_older_versions_are_verified_without(source):
    out = source.parent / "out"
    convert(source / "text.parquet", out, format="parquet")
    manifest = json.loads((out / MANIFEST).read_text())
    del manifest["files"][0]["ids"]
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert verify(out)["ok"]


@pytest.mark.parametrize(
    "ids", [7, [], {}, {"column": "id"}, {"column": 1, "xxh64": []}, {"column": "id", "xxh64": "a"}]
)
def test_damaged_entries_are_refused(source, ids):
    out = source.parent / "out"
    convert(source / "text.parquet", out, format="parquet")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][0]["ids"] = ids
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is damaged"):
        verify(out)


@pytest.mark.parametrize("ids", [{"column": "nothing", "xxh64": []}, {"column": "embedding", "xxh64": ["x"]}])
def test_entries_that_do_not_fit_are_problems(source, ids):
    out = source.parent / "out"
    convert(source / "text.parquet", out, format="parquet")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][0]["ids"] = ids
    (out / MANIFEST).write_text(json.dumps(manifest))
    (problem,) = verify(out)["problems"]
    assert problem.startswith(("text.parquet", str(out / "text.parquet")))
