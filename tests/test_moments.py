import copy
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import realign_fast as rf
from realign_fast import _files

DIM = 67  # no multiple of any vector length


def rows(count: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0.2, 1, (count, dim))
    return values.astype(np.float32)


def moments(values: np.ndarray, **options) -> rf.Moments:
    return rf.Moments(values.shape[-1]).update(values, **options)


@pytest.mark.parametrize("count", [1, 2, 8, 63, 1000])
def test_mean_and_trace_are_those_of_the_unit_rows(count):
    values = rows(count)
    unit = values.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    found = moments(values)
    assert found.count == count
    np.testing.assert_allclose(found.mean, unit.mean(0), rtol=0, atol=1e-9 + 8e-8 / np.sqrt(count))
    np.testing.assert_allclose(found.trace, unit.var(0).sum(), rtol=0, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=4), st.integers(1, 5))
def test_any_split_merged_equals_the_whole(cuts, num_threads):
    values = rows(300)
    parts = [moments(part, num_threads=num_threads) for part in np.split(values, sorted(cuts))]
    whole = moments(values)
    for order in itertools.islice(itertools.permutations(parts), 6):
        merged = rf.Moments(DIM)
        for part in order:
            merged.merge(part)
        assert merged == whole
    assert whole - parts[0] == sum(parts[1:], rf.Moments(DIM))


def test_the_algebra_leaves_its_operands_alone():
    a, b = moments(rows(5)), moments(rows(7, seed=1))
    before = copy.deepcopy(a)
    total = a + b
    assert a == before
    assert total - b == a
    assert total != a
    assert a.copy() == a
    assert a.copy() is not a
    assert pickle.loads(pickle.dumps(a)) == a
    assert (a == 3) is False
    assert repr(a) == "Moments(dim=67, count=5)"


def test_moments_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="dimension 67 and 3"):
        moments(rows(2)).merge(rf.Moments(3))
    with pytest.raises(ValueError, match="counts more rows"):
        moments(rows(2)) - moments(rows(3))
    with pytest.raises(ValueError, match="rows of dimension 67"):
        moments(rows(2)).update(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="at least 1"):
        rf.Moments(0)
    with pytest.raises(ValueError, match="no rows"):
        _ = rf.Moments(3).mean


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0])
def test_bad_rows_in_each_policy(bad):
    values = rows(10)
    values[[3, 7]] = bad
    good = np.delete(values, [3, 7], axis=0)
    started = moments(rows(4, seed=1))
    before = started.copy()
    with pytest.raises(ValueError, match=r"row 3 .*2 (with NaN or infinity|of norm zero)"):
        started.update(values)
    assert started == before

    skipped = moments(values, on_bad_rows="skip")
    assert (skipped.count, skipped.num_skipped, skipped.num_zero) == (8, 2, 0)
    np.testing.assert_array_equal(skipped.mean, moments(good).mean)

    zeroed = moments(values, on_bad_rows="zero")
    assert (zeroed.count, zeroed.num_skipped, zeroed.num_zero) == (10, 0, 2)
    np.testing.assert_allclose(zeroed.mean, moments(good).mean * 0.8, rtol=1e-15)
    # The trace of ten vectors of which two are zero: no constant set, though the others are unit rows.
    unit = good / np.linalg.norm(good.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(zeroed.trace, np.concatenate([unit, np.zeros((2, DIM))]).var(0).sum(), atol=1e-7)

    with pytest.raises(ValueError, match="on_bad_rows must be one of raise, skip, zero"):
        moments(values, on_bad_rows="drop")


@pytest.mark.parametrize("shape", [(DIM,), (0, DIM), (2, 3, DIM)])
def test_any_leading_shape(shape):
    values = rows(int(np.prod(shape[:-1]))).reshape(shape)
    assert moments(values) == moments(values.reshape(-1, DIM))


def test_layouts_give_the_same_bits():
    values = rows(50)
    wide = np.zeros((50, 2 * DIM), np.float32)
    wide[:, ::2] = values
    for other in (np.asfortranarray(values), wide[:, ::2], values[::-1], values.astype(">f4")):
        assert moments(other) == moments(values)


def test_save_and_load(tmp_path):
    found = moments(rows(9), on_bad_rows="zero")
    path = tmp_path / "m.safetensors"
    found.save(path)
    assert rf.Moments.load(path) == found
    first = path.read_bytes()
    found.save(path)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]


def test_files_that_are_no_moments_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    found = moments(rows(9))
    sums = found._sums
    good = {"count": 9, "num_zero": 0, "num_skipped": 0, "fixed_point_bits": 27}
    for fields, tensors, message in [
        (good | {"count": -1}, {"sums": sums}, "count must be a count"),
        (good | {"count": True}, {"sums": sums}, "count must be a count"),
        (good | {"num_zero": 10}, {"sums": sums}, "do not fit together"),
        (good | {"fixed_point_bits": 24}, {"sums": sums}, "units"),
        (good, {"sums": sums + (1 << 40)}, "do not fit together"),
        (good, {"sums": sums.astype(np.float64)}, "must be int64"),
        (good, {}, "'sums' is missing"),
    ]:
        _files.save(path, "moments", tensors, fields)
        with pytest.raises(ValueError, match=message):
            rf.Moments.load(path)
    with pytest.raises(FileNotFoundError):
        rf.Moments.load(tmp_path / "none.safetensors")
