"""Ray Data: rows mapped in its tasks, and statistics and fits of its data sets, to the bits of arrays."""

import logging
import subprocess
import sys
import warnings

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import realign_fast as rf
from realign_fast._errors import BadRowsError
from realign_fast.data import align

# Ray's own threads, sockets and deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ray = pytest.importorskip("ray", reason="ray is not installed")
from realign_fast.ray import _BlockReader, _BlockSource  # noqa: E402 (needs ray)

DIM = 24
COUNTS = (400, 1, 60, 539)
TOTAL = sum(COUNTS)


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray.data

        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            # A process takes seconds to start, and Ray ends those that are idle for one.
            _system_config={"idle_worker_killing_time_threshold_ms": 600_000, "num_workers_soft_limit": 8},
        )
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


def cloud(count, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=DIM) + 0.8 * rng.normal(size=(count, DIM))).astype(dtype)


TEXT, IMAGE = cloud(TOTAL, 1), cloud(700, 2)


def tensors(rows, num_blocks=5, **columns):
    """Return a data set of tensors in blocks of different sizes."""
    cuts = np.sort(np.random.default_rng(0).choice(len(rows), num_blocks - 1, replace=False))
    parts = np.split(np.arange(len(rows)), cuts)
    tables = []
    for part in parts:
        kind = pa.list_(pa.from_numpy_dtype(rows.dtype), DIM)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows[part].reshape(-1)), type=kind)
        array = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(kind.value_type, [DIM]), lists)
        tables.append(pa.table({"embedding": array} | {name: of[part] for name, of in columns.items()}))
    return ray.data.from_arrow(tables)


@pytest.fixture
def files(tmp_path):
    """Write lists in several parquet files, in row groups."""
    (tmp_path / "text").mkdir()
    for number, part in enumerate(np.split(TEXT, np.cumsum(COUNTS)[:-1])):
        table = pa.table({"embedding": list(part), "id": [f"{number}-{i}" for i in range(len(part))]})
        parquet.write_table(table, tmp_path / "text" / f"part_{number}.parquet", row_group_size=100)
    return tmp_path / "text"


@pytest.mark.parametrize("method", ["realign", "anchor_trace"])
def test_a_fit_is_that_of_the_same_rows_in_arrays(method):
    options = {"refine": 1} if method == "realign" else {}
    wanted = rf.fit(TEXT, IMAGE, method=method, **options)
    found = rf.ray.fit(tensors(TEXT), tensors(IMAGE), method=method, encoder="e", **options)
    assert found.fingerprint == wanted.fingerprint
    assert found.report == wanted.report
    assert found.report["held_out"] is not None
    assert (found.encoder, found.source.count, found.target.count) == ("e", TOTAL, 700)
    np.testing.assert_array_equal(found.transform(TEXT), wanted.transform(TEXT))


@pytest.mark.slow
def test_a_fit_of_files_that_ray_reads(files):
    text = ray.data.read_parquet(str(files), include_paths=True)
    found, wanted = rf.ray.fit(text, tensors(IMAGE), refine=1), rf.fit(TEXT, IMAGE, refine=1)
    assert (found.fingerprint, found.report) == (wanted.fingerprint, wanted.report)
    bad = TEXT[400:401] * np.nan
    parquet.write_table(pa.table({"embedding": list(bad), "id": ["1-0"]}), files / "part_1.parquet")
    dataset = ray.data.read_parquet(str(files), include_paths=True)
    with pytest.raises(BadRowsError, match=r"^column 'embedding', block of \d+ rows from \S*part_1\.parquet: row \d+ "):
        rf.ray.moments(dataset)
    alignment = rf.fit(TEXT, IMAGE)
    for batch_format in ("numpy", "pyarrow", "pandas"):
        dataset = ray.data.read_parquet(str(files.parent / "text" / "part_3.parquet"))
        found = dataset.map_batches(align(alignment), batch_format=batch_format, batch_size=64).take_all()
        np.testing.assert_array_equal(np.stack([row["embedding"] for row in found]), alignment.transform(TEXT[461:]))


def test_a_sample_smaller_than_the_set():
    rows = cloud(300_000, 3)
    wanted, found = rf.fit(rows, IMAGE), rf.ray.fit(tensors(rows, 7), tensors(IMAGE))
    assert 2 * wanted.report["in_sample"]["rows"]["text"] < len(rows)
    assert found.report == wanted.report
    assert found.fingerprint == wanted.fingerprint


def test_a_fit_of_covariances():
    wanted = rf.fit(TEXT, IMAGE, method="coral")
    found = rf.ray.fit(tensors(TEXT), tensors(IMAGE), method="coral")
    np.testing.assert_allclose(found.transform(TEXT), wanted.transform(TEXT), atol=1e-5)


@pytest.mark.parametrize("num_blocks", [1, 3, 9])
def test_moments_are_those_of_the_rows_however_they_lie(num_blocks):
    for dtype in (np.float16, np.float64):
        rows = TEXT.astype(dtype)
        assert rf.ray.moments(tensors(rows, num_blocks)) == rf.Moments(DIM).update(rows)
    found = rf.ray.moments(tensors(TEXT, num_blocks), covariance=True)
    wanted = rf.Moments(DIM, covariance=True).update(TEXT)
    np.testing.assert_array_equal(found.mean, wanted.mean)
    assert np.linalg.norm(found.covariance - wanted.covariance) < 3e-7 * np.linalg.norm(wanted.covariance)
    # What has come through Ray's memory can be added to.
    assert ray.get(ray.put(found)).update(TEXT).count == 2 * TOTAL


def test_moments_of_groups_and_of_pandas():
    groups = np.arange(TOTAL) % 3
    dataset = tensors(TEXT, group=groups)
    found = dataset.groupby("group").aggregate(rf.ray.MomentsAggregate(name="m")).take_all()
    assert {row["group"] for row in found} == {0, 1, 2}
    for row in found:
        assert row["m"] == rf.Moments(DIM).update(TEXT[groups == row["group"]])
    frame = dataset.to_pandas()
    assert rf.ray.moments(ray.data.from_pandas(frame)) == rf.Moments(DIM).update(TEXT)


def test_bad_rows_and_where_they_are():
    spoiled = TEXT.copy()
    spoiled[[407, 420]] = np.nan
    with pytest.raises(BadRowsError, match=r"^column 'embedding', block of \d+ rows from 8\.parquet: row \d+ is bad"):
        rf.ray.moments(tensors(spoiled, path=np.array([f"{i // 50}.parquet" for i in range(TOTAL)])))
    with pytest.raises(
        BadRowsError, match=r"^text, column 'embedding', block of 1000 rows: row 407 is bad .*2 with NaN"
    ):
        rf.ray.fit(tensors(spoiled, 1), tensors(IMAGE))
    skipped = rf.ray.fit(tensors(spoiled), tensors(IMAGE), on_bad_rows="skip")
    assert skipped.fingerprint == rf.fit(spoiled, IMAGE, on_bad_rows="skip").fingerprint
    assert skipped.source.num_skipped == 2


def test_data_sets_that_are_wrong(tmp_path):
    with pytest.raises(TypeError, match=r"text must be a ray.data.Dataset, got ndarray"):
        rf.ray.fit(TEXT, tensors(IMAGE))
    with pytest.raises(ValueError, match=r"image has no column 'x'; its columns are \['embedding'\]"):
        rf.ray.fit(tensors(TEXT), tensors(IMAGE), image_column="x")
    with pytest.raises(ValueError, match="method must be one of"):
        rf.ray.fit(None, None, method="no")
    with pytest.raises(ValueError, match="column 'n' must hold lists or tensors of numbers, got int64"):
        rf.ray.moments(ray.data.from_items([{"n": 1}]), "n")
    ragged = ray.data.from_items([{"embedding": [1.0, 2.0]}, {"embedding": [1.0]}], override_num_blocks=1)
    with pytest.raises(ValueError, match="column 'embedding': row 1 has 1 elements, expected 2"):
        rf.ray.moments(ragged)
    lists = pa.list_(pa.float32())
    mixed = ray.data.from_arrow([pa.table({"embedding": pa.array(list(x), lists)}) for x in (TEXT, TEXT[:2, :2])])
    with pytest.raises(
        ValueError, match=r"must have rows of dimension 24, got shape \(2, 2\)|has dimension 2 and dtype"
    ):
        rf.ray.fit(mixed, tensors(IMAGE))
    block = _BlockSource(pa.table({"embedding": pa.array(list(TEXT[:2, :2]), lists)}), "embedding", "text, ")
    with pytest.raises(
        ValueError, match=r"block of 2 rows has dimension 2 and dtype float32, the first .* 24 and float16"
    ):
        _BlockReader("raise", 9, 24, "float16").moments(block)
    with pytest.raises(ValueError, match="no rows"):
        rf.ray.moments(tensors(TEXT).map_batches(lambda table: table.slice(0, 0), batch_format="pyarrow"))
    growing = tmp_path / "grown"

    def grow(table):
        growing.mkdir(exist_ok=True)
        (growing / str(len(list(growing.iterdir())))).touch()
        return table.slice(0, max(1, 100 - len(list(growing.iterdir()))))

    changing = tensors(TEXT, 1).map_batches(grow, batch_format="pyarrow", batch_size=None)
    with pytest.raises(ValueError, match=r"text had 9\d rows when counted and gave 9\d now"):
        rf.ray.fit(changing, tensors(IMAGE))


@pytest.mark.parametrize("batch_format", ["numpy", "pyarrow", "pandas"])
def test_rows_are_mapped_in_every_batch_format(batch_format):
    alignment = rf.fit(TEXT, IMAGE)
    wanted = alignment.transform(TEXT)
    kinds = pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), DIM)
    lists = [
        ray.data.from_arrow(pa.table({"id": range(TOTAL), "embedding": pa.array(list(TEXT), kind)})) for kind in kinds
    ]
    for dataset in (tensors(TEXT, id=np.arange(TOTAL)), *lists):
        mapped = dataset.map_batches(align(alignment), batch_format=batch_format, batch_size=300).materialize()
        found = sorted(mapped.take_all(), key=lambda row: row["id"])
        assert [row["id"] for row in found] == list(range(TOTAL))
        values = np.stack([row["embedding"] for row in found])
        np.testing.assert_array_equal(values.astype(np.float32), wanted)
        if batch_format == "pyarrow":
            assert mapped.schema().types == dataset.schema().types


def test_single_rows_are_mapped():
    alignment = rf.fit(TEXT, IMAGE)
    found = tensors(TEXT[:9], 2).map(align(alignment)).take_all()
    np.testing.assert_array_equal(np.stack([row["embedding"] for row in found]), alignment.transform(TEXT[:9]))


def test_tasks_use_the_cores_they_were_given():
    @ray.remote
    def threads():
        from realign_fast.backends import count_threads

        return count_threads(None)

    assert ray.get([threads.options(num_cpus=cores).remote() for cores in (1, 2, 0.5)]) == [1, 2, 1]


def test_without_ray_it_says_what_to_install():
    code = "import sys; sys.modules['ray'] = None\nimport realign_fast.ray"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    line = found.stderr.splitlines()[-1]
    assert line == "ImportError: realign_fast.ray needs Ray Data: pip install 'realign-fast[ray]'"
