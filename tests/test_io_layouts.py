"""Folders of Hugging Face `datasets` and of clip-retrieval: which files are read, for which side, under which ids."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import realign_fast as rf
from realign_fast import cli
from realign_fast.alignment import apply_files
from realign_fast.data import EmbeddingDataset, EmbeddingStream
from realign_fast.io.sources import file_paths, open_source
from realign_fast.io.writer import verify

DIM = 8


def values_of(count, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(1, 1, (count, DIM)).astype(dtype)


def rows_of(path, **options):
    source = open_source(path, name="text", **options)
    return np.concatenate([batch.rows.values.copy() for batch in source.batches()])


@pytest.fixture(scope="module")
def alignment():
    return rf.fit(values_of(100, seed=10), values_of(100, seed=11) - 1.5)


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("datasets")


def made(hf, values, feature=None):
    columns = {"id": [f"row-{i}" for i in range(len(values))], "embedding": list(values)}
    kind = feature or hf.Sequence(hf.Value(values.dtype.name))
    return hf.Dataset.from_dict(columns, features=hf.Features({"id": hf.Value("string"), "embedding": kind}))


# Hugging Face datasets


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["list", "fixed", "large"])
def test_a_saved_dataset_is_read_in_its_own_order(tmp_path, hf, kind, dtype):
    values = values_of(110, dtype=dtype)
    feature = {
        "list": hf.Sequence(hf.Value(dtype)),
        "fixed": hf.Sequence(hf.Value(dtype), length=DIM),
        "large": hf.LargeList(hf.Value(dtype)),
    }[kind]
    made(hf, values, feature).save_to_disk(tmp_path / "set", num_shards=11)
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    assert len(state["_data_files"]) == 11
    np.testing.assert_array_equal(rows_of(tmp_path / "set"), values)
    # The order and the choice are those of the list, whatever else lies there.
    shutil.copy(tmp_path / "set" / "data-00003-of-00011.arrow", tmp_path / "set" / "cache-0123456789abcdef.arrow")
    state["_data_files"].reverse()
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    np.testing.assert_array_equal(rows_of(tmp_path / "set"), np.concatenate(np.split(values, 11)[::-1]))


def test_a_saved_dataset_is_mapped_streamed_and_found_by_id(tmp_path, hf, alignment):
    values = values_of(90)
    made(hf, values).save_to_disk(tmp_path / "set", num_shards=3)
    summary = apply_files(alignment, tmp_path / "set", tmp_path / "out")
    assert (summary["files"], summary["rows"]) == (3, 90)
    mapped = alignment.transform(values)
    np.testing.assert_array_equal(rows_of(tmp_path / "out"), mapped)
    assert verify(tmp_path / "out")["ok"]
    again = hf.concatenate_datasets([hf.Dataset.from_file(os.fspath(path)) for path in file_paths(tmp_path / "out")])
    np.testing.assert_array_equal(np.array(again["embedding"], np.float32), mapped)
    assert again["id"][:2] == ["row-0", "row-1"]
    data = EmbeddingDataset(tmp_path / "set", alignment, index=tmp_path / "index")
    np.testing.assert_array_equal(data["row-77"]["embedding"].numpy(), mapped[77])
    batches = list(EmbeddingStream(tmp_path / "set", alignment, 32))
    np.testing.assert_array_equal(np.concatenate([batch["embedding"].numpy() for batch in batches]), mapped)
    rf.fit(tmp_path / "set", values_of(50, seed=3))


def test_a_dataset_of_several_splits_asks_for_one(tmp_path, hf, capsys):
    splits = {"train": made(hf, values_of(5)), "test": made(hf, values_of(3, seed=1))}
    hf.DatasetDict(splits).save_to_disk(tmp_path / "all")
    for act in (lambda: open_source(tmp_path / "all", name="text"), lambda: EmbeddingDataset(tmp_path / "all")):
        with pytest.raises(
            ValueError, match=r"all holds several splits: name one of them: \S*/all/train, \S*/all/test"
        ):
            act()
    np.testing.assert_array_equal(rows_of(tmp_path / "all" / "test"), values_of(3, seed=1))
    capsys.readouterr()
    assert cli.main(["stats", str(tmp_path / "all"), "-o", str(tmp_path / "m.safetensors")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_selection_of_rows_is_saved_flat_today_and_refused_where_it_is_not(tmp_path, hf):
    values = values_of(40)
    made(hf, values).select([7, 3, 30]).save_to_disk(tmp_path / "set")
    np.testing.assert_array_equal(rows_of(tmp_path / "set"), values[[7, 3, 30]])
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"set is a selection of rows .*: save dataset\.flatten_indices\(\) instead"):
        rows_of(tmp_path / "set")


@pytest.mark.parametrize(
    "name", ["../other.arrow", "/etc/passwd", "sub/a.arrow", "", ".hidden.arrow", "a\0b", None, 5, []]
)
def test_files_outside_of_the_folder_are_refused(tmp_path, hf, name):
    made(hf, values_of(4)).save_to_disk(tmp_path / "set")
    shutil.copy(tmp_path / "set" / "data-00000-of-00001.arrow", tmp_path / "other.arrow")
    (tmp_path / "set" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match=r"state\.json names .*, which is no file of its folder: refused"):
        rows_of(tmp_path / "set")


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            '{"_data_files": [{"filename": "gone.arrow"}]}',
            FileNotFoundError,
            r"gone\.arrow does not exist, but .*state",
        ),
        ('{"_data_files": []}', ValueError, r"state\.json is damaged: _data_files must be a list of files"),
        ('{"_data_files": {"a": 1}}', ValueError, r"state\.json is damaged"),
        ("{}", ValueError, r"state\.json is damaged"),
        ("[]", ValueError, r"state\.json is damaged: expected an object"),
        ("{", ValueError, r"state\.json is damaged"),
        ("[" * 100_000, ValueError, r"state\.json is damaged"),
        ("\xff", ValueError, r"state\.json is damaged"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path, hf, state, error, message):
    made(hf, values_of(4)).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "state.json").write_bytes(state.encode("latin1"))
    with pytest.raises(error, match=message):
        rows_of(tmp_path / "set")


def test_the_cache_of_a_dataset_is_read(tmp_path, hf):
    values = values_of(60)
    parquet.write_table(made(hf, values).data.table, tmp_path / "in.parquet")
    options = {"data_files": {"train": [os.fspath(tmp_path / "in.parquet")] * 2}, "cache_dir": tmp_path / "cache"}
    data = hf.load_dataset("parquet", split="train", num_proc=None, **options)
    folder = Path(data.cache_files[0]["filename"]).parent
    data.map(lambda row: {"n": 1}).filter(lambda row: row["id"] != "row-1")  # leave files of their own
    assert list(folder.glob("cache-*.arrow"))
    np.testing.assert_array_equal(rows_of(folder), np.concatenate([values, values]))
    # As it is written where there is more than one process, or a split is large.
    (only,) = folder.glob("parquet-train.arrow")
    for number in range(2):
        shutil.copy(only, folder / f"parquet-train-{number:05}-of-00002.arrow")
    only.unlink()
    names = [path.name for path in file_paths(folder)]
    assert names == ["parquet-train-00000-of-00002.arrow", "parquet-train-00001-of-00002.arrow"]
    (folder / "parquet-train-00000-of-00002.arrow").unlink()
    with pytest.raises(FileNotFoundError, match="file 0 of the 2 of parquet-train is missing"):
        file_paths(folder)


def test_a_cache_of_several_splits_asks_for_one(tmp_path, hf):
    parquet.write_table(made(hf, values_of(6)).data.table, tmp_path / "in.parquet")
    file = os.fspath(tmp_path / "in.parquet")
    data = hf.load_dataset("parquet", data_files={"train": file, "test": file}, cache_dir=tmp_path / "cache")
    folder = Path(data["train"].cache_files[0]["filename"]).parent
    with pytest.raises(
        ValueError, match=r"several splits: name one of them: \S*parquet-test\*\.arrow, \S*parquet-train\*"
    ):
        file_paths(folder)
    assert len(rows_of(os.fspath(folder / "parquet-test*.arrow"))) == 6


def test_a_folder_that_only_has_a_state_is_any_folder(tmp_path, write_shard):
    write_shard(tmp_path / "a.npy", values_of(3))
    (tmp_path / "state.json").write_text("{}")
    assert file_paths(tmp_path) == [tmp_path / "a.npy"]


# clip-retrieval


@pytest.fixture
def clip(tmp_path):
    """What `clip-retrieval inference` writes, of three parts."""
    folder = tmp_path / "clip"
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, count in enumerate((30, 11, 25)):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", values_of(count, seed=number))
        np.save(folder / "text_emb" / f"text_emb_{number}.npy", values_of(count, seed=100 + number) - 1)
        names = [f"{number}/{i}.jpg" for i in range(count)]
        table = pa.table({"image_path": names, "caption": [f"of {name}" for name in names], "n": range(count)})
        parquet.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def side_of(folder, name):
    return np.concatenate([np.load(folder / name / f"{name}_{number}.npy") for number in range(3)])


def test_a_fit_takes_each_side_from_its_folder(clip):
    found = rf.fit(clip, clip)
    expected = rf.fit(clip / "text_emb", clip / "img_emb")
    np.testing.assert_array_equal(found.shift, expected.shift)
    assert found.report == expected.report
    assert found.fingerprint == expected.fingerprint
    text, image = rf.Moments(DIM), rf.Moments(DIM)
    text.update(side_of(clip, "text_emb"))
    image.update(side_of(clip, "img_emb"))
    np.testing.assert_array_equal(rf.fit_from_moments(text, image, text=clip).shift, expected.shift)


@pytest.mark.parametrize(("side", "name"), [("source", "text_emb"), ("target", "img_emb")])
def test_apply_maps_the_side_asked_for(tmp_path, clip, alignment, side, name):
    alignment.save(tmp_path / "a.safetensors")
    arguments = ["apply", str(tmp_path / "a.safetensors"), str(clip), "-o", str(tmp_path / "out"), "--side", side]
    assert cli.main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npy")) == [f"{name}_{i}.npy" for i in range(3)]
    np.testing.assert_array_equal(rows_of(tmp_path / "out"), alignment.transform(side_of(clip, name), side=side))
    with pytest.raises(ValueError, match="is the folder of the input"):
        apply_files(alignment, clip, clip, side=side)


def test_where_no_side_is_meant_it_must_be_named(tmp_path, clip, capsys):
    message = r"clip holds the embeddings of images and texts: name \S*clip/text_emb or \S*clip/img_emb"
    for act in (EmbeddingDataset, EmbeddingStream, file_paths):
        with pytest.raises(ValueError, match=message):
            act(clip)
    for arguments in (["stats", str(clip), "-o", str(tmp_path / "m")], ["inspect", str(clip)]):
        assert cli.main(arguments) == 1
        error = capsys.readouterr().err
        assert "clip/text_emb or" in error
        assert error.count("\n") == 1
    shutil.rmtree(clip / "text_emb")
    with pytest.raises(ValueError, match=r"clip holds no text_emb: expected it there, or name \S*clip/img_emb$"):
        rf.fit(clip, clip)
    assert len(file_paths(clip, "target")) == 3


def test_a_folder_with_files_of_its_own_is_any_folder(clip, write_shard):
    write_shard(clip / "a.npy", values_of(3))
    assert file_paths(clip) == [clip / "a.npy"]


@pytest.mark.parametrize("name", ["text_emb", "img_emb"])
@pytest.mark.parametrize("id_column", ["image_path", "caption"])
def test_ids_are_those_of_the_metadata(tmp_path, clip, name, id_column, monkeypatch):
    data = EmbeddingDataset(clip / name, id_column=id_column, index=tmp_path / "index")
    rows = side_of(clip, name)
    asked = (
        ["2/24.jpg", "0/0.jpg", "1/10.jpg"]
        if id_column == "image_path"
        else [f"of {x}.jpg" for x in ("2/24", "0/0", "1/10")]
    )
    assert data.numbers_of(asked).tolist() == [65, 0, 40]
    np.testing.assert_array_equal(data[asked[0]]["embedding"].numpy(), rows[65])
    stream = EmbeddingStream(clip / name, None, 30, id_column=id_column, index=tmp_path / "index")
    assert next(iter(stream))["id"][0] == asked[1]
    monkeypatch.chdir(clip / name)
    assert EmbeddingDataset(f"{name}_1.npy", id_column=id_column, index=tmp_path / "other").numbers_of([asked[2]]) == [
        10
    ]


def test_numbers_are_matched_as_numbers(tmp_path, clip):
    for number in range(3):
        (clip / "text_emb" / f"text_emb_{number}.npy").rename(clip / "text_emb" / f"text_emb_{number:02}.npy")
    (clip / "metadata" / "metadata_10.parquet").touch()
    (clip / "metadata" / "notes.txt").touch()
    data = EmbeddingDataset(clip / "text_emb", id_column="image_path", index=tmp_path / "index")
    assert data.numbers_of(["1/0.jpg"]).tolist() == [30]


def test_metadata_that_do_not_fit_are_refused(tmp_path, clip):
    def open_index(**options):
        return EmbeddingDataset(clip / "text_emb", index=tmp_path / "index", **({"id_column": "image_path"} | options))

    with pytest.raises(
        ValueError, match=r"metadata_0\.parquet: no column 'id' of ids; it has \['image_path', 'caption'"
    ):
        open_index(id_column="id")
    tables = [parquet.read_table(clip / "metadata" / f"metadata_{number}.parquet") for number in range(3)]
    # As many in all, but not of each file.
    parquet.write_table(pa.concat_tables([tables[0], tables[1][:1]]), clip / "metadata" / "metadata_0.parquet")
    parquet.write_table(tables[1][1:], clip / "metadata" / "metadata_1.parquet")
    with pytest.raises(ValueError, match=r"metadata_0\.parquet holds 31 ids, \S*text_emb_0\.npy has 30 rows"):
        open_index()
    (clip / "metadata" / "metadata_2.parquet").unlink()
    with pytest.raises(ValueError, match=r"text_emb_2\.npy has no ids: pass ids="):
        open_index()
    shutil.rmtree(clip / "metadata")
    with pytest.raises(ValueError, match=r"text_emb_0\.npy has no ids: pass ids="):
        open_index()
    assert not (tmp_path / "index").exists()
