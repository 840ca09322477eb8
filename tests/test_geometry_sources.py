import numpy as np
import pytest

import realign_fast as rf
from realign_fast._errors import BadRowsError
from realign_fast._reader import Reader
from realign_fast.geometry._sources import Fold, Mapped, draw, numbers_of
from realign_fast.io.sources import open_source
from realign_fast.reference import project

DIM = 24


def make(count, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(0.2, 1, (count, DIM)).astype(dtype)


def folds_of(data, num_folds, seed=0, limit=None, refuse=True, **options):
    source = open_source(data, name="text", **options)
    return [Fold(source, num_folds, number, seed, limit, refuse) for number in range(num_folds)]


def rows_of(source, limit=None):
    parts = [batch.rows.values.copy() for batch in source.batches(limit)]
    return np.concatenate(parts) if parts else np.empty((0, DIM), np.float32)


@pytest.mark.parametrize(("count", "num_folds"), [(1000, 2), (1001, 3), (7, 3), (5, 1), (2, 3)])
@pytest.mark.parametrize("batch_bytes", [1, 1000, 1 << 20])
def test_folds_divide_all_rows(count, num_folds, batch_bytes):
    rows = make(count)
    parts = [rows_of(fold) for fold in folds_of(rows, num_folds, batch_bytes=batch_bytes)]
    assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, rows))
    assert [len(part) for part in parts] == [fold.num_rows for fold in folds_of(rows, num_folds)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_folds_depend_on_the_seed_alone(tmp_path):
    rows = make(999)
    for number, part in enumerate(np.split(rows, [10, 500])):
        np.save(tmp_path / f"{number}.npy", part)
    of_array, of_files = rows_of(folds_of(rows, 2)[1]), rows_of(folds_of(tmp_path, 2)[1])
    np.testing.assert_array_equal(of_array, of_files)
    assert not np.array_equal(of_array, rows_of(folds_of(rows, 2, seed=1)[1]))
    # No pattern in where the rows of a fold lie.
    places = np.flatnonzero(np.isin(rows[:, 0], of_array[:, 0])) % 2
    assert 0.4 < places.mean() < 0.6


def test_pairs_stay_together():
    text, image = make(100), make(100, seed=1)
    chosen = [np.isin(rows[:, 0], rows_of(folds_of(rows, 3)[2])[:, 0]) for rows in (text, image)]
    np.testing.assert_array_equal(*chosen)


def test_limits():
    rows = make(50)
    parts = [rows_of(fold) for fold in folds_of(rows, 2, limit=20)]
    assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, rows[:20]))
    fold = folds_of(rows, 2)[0]
    np.testing.assert_array_equal(rows_of(fold, 7), rows_of(fold)[:7])


def test_bad_rows_are_named_by_file_and_row(tmp_path):
    rows = make(60)
    rows[41] = np.nan
    np.save(tmp_path / "a.npy", rows[:30])
    np.save(tmp_path / "b.npy", rows[30:])
    for fold in folds_of(tmp_path, 2):
        with pytest.raises(BadRowsError, match=r"b\.npy: row 11 is bad"):
            rows_of(fold)
    kept = [rows_of(fold) for fold in folds_of(tmp_path, 2, refuse=False)]
    assert sum(map(len, kept)) == 60


@pytest.mark.parametrize("method", ["realign", "c3", "coral"])
def test_mapped_rows_are_those_of_the_alignment(method):
    text, image = make(400), make(400, seed=1) + 0.5
    alignment = rf.fit(text, image, method=method)
    source = open_source(text, name="text", batch_bytes=5000)
    mapped = Mapped(source, alignment.parameters, seed=3)
    wanted = alignment.transform(text, seed=3, index=np.arange(400))
    np.testing.assert_allclose(rows_of(mapped), wanted, atol=2e-7)
    moments = Reader("raise").moments(mapped, covariance=True)
    np.testing.assert_allclose(moments.mean, wanted.mean(axis=0), atol=1e-6)


def test_what_is_drawn(tmp_path):
    rows = make(500, dtype=np.float16)
    rows[7], rows[9] = 0, np.inf
    numbers = np.array([0, 7, 8, 9, 300, 499])
    found = draw(open_source(rows, name="text", batch_bytes=999), numbers)
    assert found.numbers.tolist() == [0, 8, 300, 499]
    np.testing.assert_allclose(found.rows, project(rows[found.numbers].astype(np.float64)), atol=1e-6)
    assert len(draw(open_source(rows, name="text"), numbers[:0]).rows) == 0


def test_numbers():
    assert numbers_of(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    drawn = numbers_of(10**12, 1000, 0)
    assert len(set(drawn.tolist())) == 1000
    assert (np.diff(drawn) > 0).all()
    assert np.array_equal(drawn, numbers_of(10**12, 1000, 0))
    assert not np.array_equal(drawn, numbers_of(10**12, 1000, 1))
