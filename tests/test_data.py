"""Data sets and streams over files: every row once, the same after a pause, in workers and ranks, by number or id."""

import gc
import os
import pickle
import warnings

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

import realign_fast as rf
from realign_fast import _files
from realign_fast._errors import BadRowsError
from realign_fast.data import DriftWarning, EmbeddingDataset, EmbeddingStream, align, align_collate

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

DIM = 24
COUNTS = (300, 1, 0, 77, 620)
TOTAL = sum(COUNTS)


def make(count, dim=DIM, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(0.1, 1, (count, dim)).astype(dtype)


@pytest.fixture
def alignment():
    return rf.fit(make(200, seed=1), make(200, seed=2))


@pytest.fixture
def whole():
    return make(TOTAL, seed=5)


@pytest.fixture
def folder(tmp_path, whole):
    path = tmp_path / "shards"
    path.mkdir()
    for number, part in enumerate(np.split(whole, np.cumsum(COUNTS)[:-1])):
        np.save(path / f"part_{number}.npy", part)
    return path


def names_of(count):
    return [f"image_{i * 7919 % count:05}/é" for i in range(count)]


@pytest.fixture
def id_files(tmp_path):
    path = tmp_path / "metadata"
    path.mkdir()
    names = names_of(TOTAL)
    for number, (start, end) in enumerate(((0, 500), (500, TOTAL))):
        table = pa.table({"id": names[start:end], "other": list(range(start, end))})
        parquet.write_table(table, path / f"metadata_{number}.parquet")
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("suffix", ["npy", "safetensors", "arrow"])
def test_rows_by_number(tmp_path, alignment, dtype, suffix):
    rows = make(90, dtype=dtype)
    path = tmp_path / f"b.{suffix}"
    if suffix == "npy":
        np.save(path, rows)
    elif suffix == "safetensors":
        from safetensors.numpy import save_file

        save_file({"embedding": rows}, path)
    else:
        values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), DIM)
        table = pa.table({"embedding": values})
        with pa.OSFile(os.fspath(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=40)
    plain, mapped = EmbeddingDataset(path), EmbeddingDataset(path, alignment)
    assert (len(plain), plain.dim, plain.dtype) == (90, DIM, getattr(torch, dtype))
    assert plain[41]["id"] == 41
    np.testing.assert_array_equal(plain[41]["embedding"].numpy(), rows[41])
    np.testing.assert_array_equal(plain[-1]["embedding"].numpy(), rows[-1])
    order = np.random.default_rng(0).permutation(90)
    found = torch.stack([each["embedding"] for each in mapped.__getitems__(order.tolist())])
    np.testing.assert_array_equal(found.numpy(), alignment.transform(rows)[order])
    with pytest.raises(IndexError, match="row 90 of 90 rows"):
        plain[90]
    assert plain.__getitems__([]) == []


def test_rows_by_id(tmp_path, folder, id_files, whole):
    index = tmp_path / "ids.index"
    data = EmbeddingDataset(folder, ids=id_files, index=index)
    names = names_of(TOTAL)
    order = np.random.default_rng(1).permutation(TOTAL)
    found = data.__getitems__([names[i] for i in order])
    assert [each["id"] for each in found] == [names[i] for i in order]
    np.testing.assert_array_equal(torch.stack([each["embedding"] for each in found]).numpy(), whole[order])
    assert data[3]["id"] == names[3]
    np.testing.assert_array_equal(data.numbers_of(names), np.arange(TOTAL))
    with pytest.raises(KeyError, match="no id 'nobody' among the 998"):
        data.numbers_of([names[0], "nobody"])
    assert data.locate(["nobody", names[3], ""]).tolist() == [-1, 3, -1]
    with pytest.raises(TypeError, match="ids must be text, got 5"):
        data.numbers_of([5])
    made = index.stat().st_mtime_ns
    EmbeddingDataset(folder, ids=id_files, index=index)
    assert index.stat().st_mtime_ns == made
    again = pickle.loads(pickle.dumps(data))
    assert again[names[17]]["id"] == names[17]
    # Of other files, it is made anew.
    np.save(folder / "part_0.npy", whole[:300] + 1)
    EmbeddingDataset(folder, ids=id_files, index=index)
    assert index.stat().st_mtime_ns != made
    with pytest.raises(ValueError, match="with an index alone"):
        EmbeddingDataset(folder).numbers_of(["a"])
    with pytest.raises(ValueError, match="ids need an index"):
        EmbeddingDataset(folder, ids=id_files)


def test_integer_ids_and_those_of_arrow_files(tmp_path):
    rows, ids = make(50), [i * 3 - 40 for i in range(50)]
    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), DIM)
    table = pa.table({"id": ids, "embedding": values})
    with pa.OSFile(os.fspath(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    data = EmbeddingDataset(tmp_path / "a.arrow", index=tmp_path / "index")
    assert data[7]["id"] == -19
    assert data.numbers_of([-19, 107]).tolist() == [7, 49]


def test_ids_that_are_wrong(tmp_path, folder, monkeypatch):
    def index_of(*columns, name="id"):
        (tmp_path / "m").mkdir(exist_ok=True)
        for number, values in enumerate(columns):
            parquet.write_table(pa.table({name: values}), tmp_path / "m" / f"{number}.parquet")
        return EmbeddingDataset(folder, ids=tmp_path / "m", index=tmp_path / "index")

    names = names_of(TOTAL)
    with pytest.raises(ValueError, match=r"expected ids of 998 rows, .* hold 997"):
        index_of(names[:-1])
    with pytest.raises(ValueError, match=r"id 'image_\S+' occurs twice: .*part_0\.npy row 0 and .*part_3\.npy row 76"):
        index_of([*names[:377], names[0], *names[378:]])
    with pytest.raises(ValueError, match="the id of row 2 is missing"):
        index_of([*names[:2], None, *names[3:]])
    with pytest.raises(ValueError, match="no column 'id' of ids; it has \\['name'\\]"):
        index_of(names, name="name")
    with pytest.raises(ValueError, match="ids must be text or integers, column 'id' holds double"):
        index_of(np.arange(TOTAL) * 0.5)
    with pytest.raises(ValueError, match=r"part_0\.npy has no ids: pass ids="):
        EmbeddingDataset(folder, index=tmp_path / "index")
    assert not (tmp_path / "index").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    (tmp_path / "index").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="is no index of ids"):
        index_of(names)
    (tmp_path / "index").unlink()
    index_of(names)
    monkeypatch.setattr(_files, "FORMAT_VERSION", 0)
    with pytest.raises(ValueError, match=r"format version 1, newer than .* remove it, and it is made anew"):
        index_of(names)
    monkeypatch.undo()
    rf.Moments(3).save(tmp_path / "index")
    with pytest.raises(ValueError, match="is no index of ids: it holds 'moments'"):
        index_of(names)


def test_a_file_that_changes_and_files_that_do_not_fit(folder, whole, tmp_path):
    data, changed = EmbeddingDataset(folder), EmbeddingDataset(folder)
    data[0]
    with (folder / "part_4.npy").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match=r"part_4\.npy has changed since it was opened"):
        changed[997]
    with (folder / "part_0.npy").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match=r"part_0\.npy row 299: the file was truncated while it was read"):
        data.__getitems__([0, 299])
    with pytest.raises(ValueError, match=r"part_0\.npy was truncated while it was read"):
        data[299]
    parquet.write_table(pa.table({"embedding": [[1.0, 2.0]]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="do not lie in it as in memory: make npy"):
        EmbeddingDataset(tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", make(3, dim=5))
    with pytest.raises(ValueError, match=r"a\.npy has dimension 5 and dtype float32"):
        EmbeddingDataset([folder / "part_1.npy", tmp_path / "a.npy"])


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("realign_fast.io._random._MAX_OPEN_FILES", 3)
    rows = make(70)
    for number in range(10):
        np.save(tmp_path / f"{number}.npy", rows[number * 7 : number * 7 + 7])
    data = EmbeddingDataset(tmp_path)
    order = np.random.default_rng(0).permutation(70)
    found = torch.stack([each["embedding"] for each in data.__getitems__(order.tolist())])
    np.testing.assert_array_equal(found.numpy(), rows[order])


def rows_of(batches):
    return torch.cat([each["embedding"].reshape(-1, DIM) for each in batches]).numpy()


def ids_of(batches):
    return [row for each in batches for row in np.atleast_1d(each["id"]).tolist()]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1, 64, 5000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_row_once_over_ranks(folder, whole, alignment, shuffle, batch_size, world_size):
    mapped, seen = alignment.transform(whole), []
    for rank in range(world_size):
        arguments = {"buffer_rows": 200, "rank": rank, "world_size": world_size}
        stream = EmbeddingStream(folder, alignment, batch_size, shuffle, 3, **arguments)
        found = list(stream)
        assert len(found) == len(stream)
        np.testing.assert_array_equal(rows_of(found), mapped[ids_of(found)])
        if batch_size:
            assert all(len(each["id"]) == batch_size for each in found[:-1])
        seen.append(ids_of(found))
    counts = [len(each) for each in seen]
    assert max(counts) - min(counts) <= 1
    everything = [row for each in seen for row in each]
    assert sorted(everything) == list(range(TOTAL))
    assert (everything == list(range(TOTAL))) is not shuffle


def test_epochs_and_seeds(folder):
    def order(seed, epoch):
        stream = EmbeddingStream(folder, None, 50, True, seed, buffer_rows=100)
        stream.set_epoch(epoch)
        return ids_of(stream)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_shuffle_mixes_the_whole_of_the_files(tmp_path):
    rows = np.arange(40_000, dtype=np.float32)[:, None].repeat(64, 1)
    np.save(tmp_path / "a.npy", rows)
    order = np.array(ids_of(EmbeddingStream(tmp_path / "a.npy", None, 100, True, buffer_rows=20_000)))
    places = np.arange(len(order))
    assert abs(np.corrcoef(order, places)[0, 1]) < 0.5
    assert len(np.unique(order[:100] // 4096)) > 3


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [None, 32])
@pytest.mark.parametrize("stop", [0, 1, 7, 15])
def test_it_goes_on_with_the_same_next_sample(folder, alignment, shuffle, batch_size, stop):
    def stream():
        made = EmbeddingStream(folder, alignment, batch_size, shuffle, 1, buffer_rows=96, rank=1, world_size=2)
        made.set_epoch(4)
        return made

    whole = list(stream())
    first = stream()
    iterator = iter(first)
    begun = [next(iterator) for _ in range(stop)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = stream()
    second.set_epoch(0)
    second.load_state_dict(state)
    rest = list(second)
    assert ids_of([*begun, *rest]) == ids_of(whole)
    np.testing.assert_array_equal(rows_of([*begun, *rest]), rows_of(whole))
    # The next epoch begins at its beginning.
    assert len(list(second)) == len(whole)
    with pytest.raises(ValueError, match="state: seed is 1, this stream has 2"):
        EmbeddingStream(folder, alignment, batch_size, shuffle, 2, rank=1, world_size=2).load_state_dict(state)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("buffer_rows", [96, 600])  # of 600 one worker is done long before the other
@pytest.mark.parametrize("stop", [0, 1, 2, 13, 30])
def test_a_loader_with_workers_goes_on_with_the_same_next_batch(folder, alignment, buffer_rows, stop):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make(epoch, persistent=False):
        stream = EmbeddingStream(folder, alignment, 32, True, 1, buffer_rows=buffer_rows)
        stream.set_epoch(epoch)
        options = {"num_workers": 2, "persistent_workers": persistent}
        return stateful.StatefulDataLoader(stream, batch_size=None, **options)

    whole = ids_of(make(4))
    loader = make(4)
    begun = [batch for _, batch in zip(range(stop), loader, strict=False)]
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    again = make(0, persistent=True)
    again.load_state_dict(state)
    assert ids_of([*begun, *again]) == whole
    assert ids_of(again) == whole  # the next epoch begins at its beginning


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_share_the_rows(folder, whole, alignment, id_files, tmp_path, context):
    arguments = {"ids": id_files, "index": tmp_path / "index"}
    mapped, names = alignment.transform(whole), np.array(names_of(TOTAL))
    # More workers than blocks: some have none.
    stream = EmbeddingStream(folder, alignment, 500, **arguments)
    loader = DataLoader(stream, batch_size=None, num_workers=3, multiprocessing_context=context)
    found = list(loader)
    np.testing.assert_array_equal(rows_of(found), mapped)
    assert ids_of(found) == names.tolist()
    shuffled = EmbeddingStream(folder, alignment, 50, True, buffer_rows=100, **arguments)
    options = {"num_workers": 2, "multiprocessing_context": context, "persistent_workers": True}
    loader = DataLoader(shuffled, batch_size=None, **options)
    orders = []
    for epoch in range(2):
        shuffled.set_epoch(epoch)
        found = list(loader)
        orders.append(ids_of(found))
        assert sorted(orders[-1]) == sorted(names)
        place = {name: i for i, name in enumerate(names)}
        np.testing.assert_array_equal(rows_of(found), mapped[[place[name] for name in orders[-1]]])
    assert orders[0] != orders[1]
    data = EmbeddingDataset(folder, alignment, **arguments)
    found = list(DataLoader(data, batch_size=128, num_workers=2, multiprocessing_context=context))
    np.testing.assert_array_equal(rows_of(found), mapped)
    assert ids_of(found) == names.tolist()


def test_what_pins_memory_finds_every_tensor(folder, whole, alignment, id_files, tmp_path, monkeypatch):
    # As a loader does with each batch where there is a device; tests/test_gpu.py has the loader itself.
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor.clone()) or pinned[-1])
    arguments = {"ids": id_files, "index": tmp_path / "index"}
    stream = EmbeddingStream(folder, alignment, 100, **arguments)
    found = [pin_memory(batch) for batch in stream]
    np.testing.assert_array_equal(rows_of(found), alignment.transform(whole))
    assert ids_of(found) == names_of(TOTAL)
    assert all(batch["embedding"] is tensor for batch, tensor in zip(found, pinned, strict=True))


def test_noise_is_that_of_the_row_and_the_epoch(folder):
    alignment = rf.fit(make(200, seed=1), make(200, seed=2), method="c3", sigma=0.1)
    one, other = (EmbeddingStream(folder, alignment, size) for size in (64, 100))
    first = rows_of(one)
    np.testing.assert_array_equal(first, rows_of(other))
    one.set_epoch(1)
    assert not np.array_equal(first, rows_of(one))
    data = EmbeddingDataset(folder, alignment)
    np.testing.assert_array_equal(data[5]["embedding"], data.__getitems__([9, 5])[1]["embedding"])


def test_bad_rows_say_where_they_are(tmp_path, alignment):
    rows = make(30)
    rows[17, 3] = np.nan
    np.save(tmp_path / "a.npy", rows)
    with pytest.raises(BadRowsError, match=r"a\.npy row 17"):
        list(EmbeddingStream(tmp_path / "a.npy", alignment, 8))
    assert len(list(EmbeddingStream(tmp_path / "a.npy", None, 8))) == 4


def test_arguments_that_are_wrong(folder, alignment):
    for arguments, message in (
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"buffer_rows": 0}, "buffer_rows must be at least 1, got 0"),
        ({"rank": 1}, "belong together"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1, got 2 of 2"),
        ({"alignment": rf.fit(make(9, 5), make(9, 5, seed=1))}, "alignment has dimension 5, the rows have 24"),
    ):
        with pytest.raises(ValueError, match=message):
            EmbeddingStream(folder, **arguments)


def test_the_ranks_of_torchrun_are_found(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    stream = EmbeddingStream(folder)
    assert (stream.rank, stream.world_size) == (1, 4)


def test_a_rank_without_rows(tmp_path):
    np.save(tmp_path / "a.npy", make(2))
    streams = [EmbeddingStream(tmp_path / "a.npy", None, 4, True, rank=rank, world_size=5) for rank in range(5)]
    assert sorted(ids_of([batch for stream in streams for batch in stream])) == [0, 1]


def test_a_function_for_any_pipeline(alignment, whole):
    mapped = alignment.transform(whole[:4])
    function = pickle.loads(pickle.dumps(align(alignment)))
    batch = function({"embedding": whole[:4], "id": [1, 2, 3, 4]})
    np.testing.assert_array_equal(batch["embedding"], mapped)
    assert batch["id"] == [1, 2, 3, 4]
    np.testing.assert_allclose(function({"embedding": whole[0].tolist()})["embedding"], mapped[0], atol=1e-6)
    samples = [{"embedding": row, "label": i} for i, row in enumerate(torch.from_numpy(whole[:4]))]
    found = align_collate(alignment)(samples)
    np.testing.assert_array_equal(found["embedding"].numpy(), mapped)
    assert found["label"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"expected a dict with 'embedding', got \['x'\]"):
        function({"x": 1})
    with pytest.raises(ValueError, match="expected a dict with 'other', got Tensor"):
        align_collate(alignment, "other", torch.stack)(list(torch.from_numpy(whole[:4])))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_the_map_of_datasets_takes_it(alignment, whole, form, batched):
    datasets = pytest.importorskip("datasets")
    plain = datasets.Dataset.from_dict({"id": list(range(40)), "embedding": whole[:40]})
    data = plain.with_format(form).map(align(alignment), batched=batched, batch_size=16)
    found = data.with_format("numpy")
    assert found["id"][:].tolist() == list(range(40))
    np.testing.assert_allclose(found["embedding"][:], alignment.transform(whole[:40]), atol=1e-6)


def test_the_map_of_webdataset_takes_it(tmp_path, alignment, whole):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(os.fspath(tmp_path / "a.tar")) as writer:
        for i, row in enumerate(whole[:20]):
            writer.write({"__key__": str(i), "npy": row, "txt": f"text {i}"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        data = wds.WebDataset(os.fspath(tmp_path / "a.tar"), shardshuffle=False)
        found = list(data.decode().map(align(alignment, "npy")))
        batches = list(data.decode().to_tuple("npy", "txt").batched(8).map_tuple(alignment.transform))
        del data
        gc.collect()
    mapped = alignment.transform(whole[:20])
    np.testing.assert_array_equal([each["npy"] for each in found], mapped)
    assert [each["txt"] for each in found] == [f"text {i}" for i in range(20)]
    np.testing.assert_allclose(np.concatenate([rows for rows, _ in batches]), mapped, atol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_map_of_torchdata_takes_it(alignment, whole, num_workers):
    nodes = pytest.importorskip("torchdata.nodes")
    samples = [{"embedding": torch.from_numpy(row), "id": i} for i, row in enumerate(whole[:50])]
    node = nodes.Batcher(nodes.IterableWrapper(samples), 16, drop_last=False)
    node = nodes.ParallelMapper(node, align_collate(alignment), num_workers=num_workers, method="thread")
    found = list(nodes.Loader(node))
    np.testing.assert_array_equal(rows_of(found), alignment.transform(whole[:50]))
    assert ids_of(found) == list(range(50))


def test_noise_without_numbers_of_rows_differs_between_batches(whole):
    alignment = rf.fit(make(200, seed=1), make(200, seed=2), method="c3", sigma=0.1)
    function = align(alignment)
    first, second = (function({"embedding": whole[i : i + 4]})["embedding"] for i in (0, 4))
    plain = alignment.transform(whole[:8], noise_std=0)
    assert not np.allclose(first - plain[:4], second - plain[4:], atol=1e-3)
    np.testing.assert_array_equal(function({"embedding": whole[2:6]})["embedding"][:2], first[2:])


def test_memory_is_used_again_but_not_while_a_batch_lives(tmp_path):
    rows = make(20_000, dim=256)
    np.save(tmp_path / "a.npy", rows)
    stream = EmbeddingStream(tmp_path / "a.npy", None, 2000)
    kept = list(stream)
    np.testing.assert_array_equal(torch.cat([batch["embedding"] for batch in kept]).numpy(), rows)
    views = [batch["embedding"][5] for batch in kept]
    del kept
    places = {batch["embedding"].data_ptr() for _ in range(3) for batch in stream}
    assert len(places) < 20
    np.testing.assert_array_equal(torch.stack(views).numpy(), rows[5::2000])


# ---- Drift ----------------------------------------------------------------------------------------------------------

# Few directions hold most of the variance, as in real embeddings: there a mean varies the most.
SPREAD = 1 / np.sqrt(1 + np.arange(DIM))
AWAY = np.where(np.arange(DIM) % 2, 1, -1)


def of_the_fit(count, seed, mean=0.0):
    rng = np.random.default_rng([7, seed])
    return (0.5 + mean * AWAY + SPREAD * rng.normal(size=(count, DIM))).astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    return rf.fit(of_the_fit(20_000, 0), make(500, seed=2))


@pytest.fixture
def streams(tmp_path):
    """Return the folders of rows like those of the fit and of rows that have left it half way."""
    for name, late in (("same", 0.0), ("left", 0.4)):
        (tmp_path / name).mkdir()
        for number in range(4):
            np.save(tmp_path / name / f"{number}.npy", of_the_fit(10_000, number + 1, late * (number > 1)))
    return tmp_path / "same", tmp_path / "left"


def test_no_false_alarm_in_many_windows(fitted):
    # Warnings are errors here: 4,000 first windows, and some longer ones.
    for size, count in ((64, 3000), (500, 1000)):
        for seed in range(count):
            align(fitted, check_drift=size)({"embedding": of_the_fit(size, 100 + seed)})
    function = align(fitted, check_drift=64)
    for seed in range(300):
        function({"embedding": of_the_fit(1000, 10_000 + seed)})


@pytest.mark.parametrize("batch_size", [None, 700])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_that_leaves_the_fit_is_noticed_once(fitted, streams, batch_size, shuffle):
    same, left = streams
    options = {"check_drift": 100, "seed": 1, "buffer_rows": 2000}
    list(EmbeddingStream(same, fitted, batch_size, shuffle, **options))
    stream = EmbeddingStream(left, fitted, batch_size, shuffle, **options)
    with pytest.warns(DriftWarning, match=r"the mean of 100 rows lies 0\.\d+ from .* \d+\.\d times the noise") as found:
        first = list(stream)
    assert len(found) == 1
    again = list(stream)  # it has said so
    np.testing.assert_array_equal(ids_of(first), ids_of(again))
    plain = EmbeddingStream(left, fitted, batch_size, shuffle, seed=1, buffer_rows=2000)
    np.testing.assert_array_equal(rows_of(first), rows_of(plain))


def test_rows_by_number_and_functions_watch_too(fitted, streams):
    same, left = streams
    order = np.random.default_rng(0).permutation(40_000)[:3000].tolist()
    EmbeddingDataset(same, fitted, check_drift=1000).__getitems__(order)
    with pytest.warns(DriftWarning, match="the mean of 1000 rows"):
        EmbeddingDataset(left, fitted, check_drift=1000).__getitems__(order)
    other = of_the_fit(9000, 50, 0.2)
    with pytest.warns(DriftWarning, match="the mean of 8192 rows"):
        align(fitted, check_drift=True)({"embedding": other})
    # One by one.
    function = align_collate(fitted, check_drift=500)
    with pytest.warns(DriftWarning, match="the mean of 500 rows"):
        _ = [function([{"embedding": row}]) for row in torch.from_numpy(other[:500]).to(torch.bfloat16)]
    # Aligned twice.
    mapped = align(fitted)({"embedding": of_the_fit(300, 51)})
    with pytest.warns(DriftWarning, match="not aligned yet"):
        pickle.loads(pickle.dumps(align(fitted, check_drift=300)))(mapped)


def test_workers_that_are_forked_watch(fitted, streams):
    same, left = (EmbeddingStream(path, fitted, 1000, True, check_drift=1000) for path in streams)
    assert len(list(DataLoader(same, batch_size=None, num_workers=2))) == 40
    with pytest.raises(DriftWarning, match="the mean of 1000 rows lies"):  # warnings are errors there too
        list(DataLoader(left, batch_size=None, num_workers=2))


@pytest.mark.slow
def test_workers_that_are_spawned_watch(fitted, streams, capfd):
    stream = EmbeddingStream(streams[1], fitted, 1000, True, check_drift=1000)
    found = list(DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn"))
    assert len(found) == 40
    assert capfd.readouterr().err.count("DriftWarning: the stream has left") == 1


def test_looks_become_rarer(fitted, monkeypatch):
    looked = []
    update = rf.Moments.update_rows

    def counting(self, rows, *arguments):
        looked.append(len(rows.values))
        update(self, rows, *arguments)

    monkeypatch.setattr(rf.Moments, "update_rows", counting)
    function = align(fitted, check_drift=50)
    for seed in range(200):
        function({"embedding": of_the_fit(997, seed)})
    # The first 50, then one row of 128, of 256, ... of 2,048, 50 each time, and the first of the next window.
    assert looked[0] == 50
    assert sum(looked) == 6 * 50 + 1


def test_what_cannot_be_watched(folder, alignment):
    with pytest.raises(ValueError, match="check_drift needs an alignment"):
        EmbeddingStream(folder, check_drift=True)
    with pytest.raises(ValueError, match="check_drift must be at least 1 row, got 0"):
        align(alignment, check_drift=0)
    assert issubclass(rf.alignment.DriftWarning, UserWarning)


# ---- Tables ---------------------------------------------------------------------------------------------------------


def test_tables_and_frames_keep_what_they_hold(alignment, whole):
    wanted = alignment.transform(whole[:6])
    function = align(alignment, "v")
    flat = pa.array(whole[:6].reshape(-1))
    fixed = pa.FixedSizeListArray.from_arrays(flat, DIM)
    columns = {
        "list": pa.array(list(whole[:6]), pa.list_(pa.float32())),
        "large": pa.array(list(whole[:6]), pa.large_list(pa.float32())),
        "fixed": fixed,
        "tensor": pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [DIM]), fixed),
    }
    for column in columns.values():
        table = pa.table({"id": range(6), "v": pa.chunked_array([column[:4], column[4:4], column[4:]])})
        mapped = function(table)
        assert mapped.schema == table.schema
        assert mapped["id"] == table["id"]
        storage = [chunk.storage if hasattr(chunk, "storage") else chunk for chunk in mapped["v"].chunks]
        np.testing.assert_array_equal(np.concatenate([np.stack(chunk.to_pylist()) for chunk in storage]), wanted)
        batch = function(pa.record_batch({"v": column}))
        assert isinstance(batch, pa.RecordBatch)
        assert function(table[:0]).num_rows == 0
    patches = pa.fixed_shape_tensor(pa.float32(), [2, DIM])
    table = pa.table({"v": pa.ExtensionArray.from_storage(patches, pa.FixedSizeListArray.from_arrays(flat, 2 * DIM))})
    np.testing.assert_array_equal(function(table)["v"].chunk(0).to_numpy_ndarray().reshape(6, DIM), wanted)
    with pytest.raises(ValueError, match=r"expected a column 'v', got \['x'\]"):
        function(pa.table({"x": [1]}))
    with pytest.raises(ValueError, match="column 'v': row 5 is null"):
        function(
            pa.table(
                {"v": pa.chunked_array([columns["list"][:4], pa.array([[1.0] * DIM, None], pa.list_(pa.float32()))])}
            )
        )
    permuted = pa.fixed_shape_tensor(pa.float32(), [2, DIM], permutation=[1, 0])
    with pytest.raises(ValueError, match="column 'v' holds tensors with permuted axes"):
        function(pa.table({"v": pa.ExtensionArray.from_storage(permuted, table["v"].chunk(0).storage)}))
    with pytest.raises(ValueError, match="column 'v' must hold lists or tensors of numbers, got string"):
        function(pa.table({"v": ["a"]}))

    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": range(6), "v": list(whole[:6])}, index=[5, 4, 3, 2, 1, 0])
    mapped = function(frame)
    assert mapped["id"].tolist() == list(range(6))
    np.testing.assert_array_equal(np.stack(mapped["v"]), wanted)
    np.testing.assert_array_equal(np.stack(frame["v"]), whole[:6])
    assert len(function(frame[:0])) == 0
    with pytest.raises(ValueError, match=r"expected a column 'v', got \['id'\]"):
        function(frame[["id"]])
    ragged = np.array([np.ones(3, np.float32), np.ones(2, np.float32)], dtype=object)
    with pytest.raises(ValueError, match=r"column 'v' must hold rows of one length, got shapes \[\(2,\), \(3,\)\]"):
        function({"v": ragged})
