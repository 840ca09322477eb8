"""Moments with a covariance, against the plain float64 version."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import realign_fast as rf
from realign_fast import _files, reference
from realign_fast._dtypes import DTYPES, Rows, storage, to_float64
from realign_fast._native import _C

# 1: no vector; 47, 48, 49: around a tile; 200: several tiles and no whole one; 768: what users have.
DIMS = (1, 3, 47, 48, 49, 200, 768)
# Rows are rounded to float32, and short sums of them too: of few rows, nothing averages that out.
SLACK, FEW_ROWS_SLACK = 1e-7, 2e-7


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request):
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set("auto")


def make(count, dim, seed=0, mean=0.3):
    """Return unit rows around a mean that is not zero, in float32."""
    rng = np.random.default_rng(seed)
    centre = reference.project(rng.normal(size=(1, dim)))
    values = mean * centre + rng.normal(size=(count, dim)) / np.sqrt(dim)
    return reference.project(values).astype(np.float32)


def collected(values, **options):
    return rf.Moments(values.shape[-1], covariance=True).update(values, **options)


def error(found, wanted):
    """Return the relative error in the Frobenius norm."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("count", [2, 7, 300, 2500])
def test_covariance_is_that_of_the_unit_rows(instruction_set, dim, count):
    values = make(count, dim) * np.float32(3)
    found = collected(values)
    wanted = reference.covariance(values.astype(np.float64))[2]
    slack = SLACK if count >= 300 and dim > 3 else FEW_ROWS_SLACK
    assert np.linalg.norm(found.covariance - wanted) <= slack * np.linalg.norm(wanted)
    np.testing.assert_array_equal(found.covariance, found.covariance.T)
    np.testing.assert_allclose(np.trace(found.covariance), found.trace, atol=2e-7)
    plain = rf.Moments(dim).update(values)
    np.testing.assert_array_equal(found.mean, plain.mean)
    assert (found.count, found.trace) == (plain.count, plain.trace)


@pytest.mark.parametrize("dtype", DTYPES)
def test_covariance_of_each_dtype(instruction_set, dtype):
    values = make(200, 65)
    if dtype == "bfloat16":
        rows = Rows((values.view(np.uint32) >> 16).astype(np.uint16), dtype)
    else:
        rows = Rows(values.astype(storage(dtype)), dtype)
    found = rf.Moments(65, covariance=True)
    found.update_rows(rows, "raise")
    assert error(found.covariance, reference.covariance(to_float64(rows))[2]) < SLACK


def test_rows_of_any_magnitude(instruction_set):
    values = make(400, 100)
    wanted = reference.covariance(values.astype(np.float64))[2]
    scaled = values * np.float32(10) ** np.arange(-30, 34, 0.16, dtype=np.float32)[:400, None]
    assert error(collected(scaled).covariance, wanted) < SLACK


def test_a_mean_of_norm_nine_tenths_costs_no_digits(instruction_set):
    values = make(20_000, 96, mean=2.0)
    found = collected(values)
    assert np.linalg.norm(found.mean) > 0.88
    assert error(found.covariance, reference.covariance(values.astype(np.float64))[2]) < 1e-7


def test_first_rows_that_are_unlike_the_others():
    """The pilot is then far from the mean."""
    values = np.concatenate([make(5000, 64, seed=1, mean=3), make(5000, 64, seed=2, mean=3)])
    found = rf.Moments(64, covariance=True)
    for part in np.array_split(values, 7):
        found.update(part)
    assert error(found.covariance, reference.covariance(values.astype(np.float64))[2]) < 1e-7


@pytest.mark.parametrize("sizes", [(0,), (0, 0, 1), (1,), (1, 1, 1), (3, 40), (63,)])
def test_a_first_batch_of_few_rows_or_none_costs_no_digits(sizes):
    values = make(5000, 512, mean=2)
    wanted = reference.covariance(values.astype(np.float64))[2]
    parts = np.split(values, np.cumsum(sizes))
    updated, merged = rf.Moments(512, covariance=True), rf.Moments(512, covariance=True)
    for part in parts:
        updated.update(part)
    assert error(updated.covariance, wanted) < 1e-7
    for row in range(sum(sizes)):
        merged.merge(collected(values[row : row + 1]))
    assert error(merged.update(parts[-1]).covariance, wanted) < 1e-7


def test_bad_rows_alone_are_no_pilot():
    values = make(5000, 512, mean=2)
    wanted = reference.covariance(values.astype(np.float64))[2]
    found = collected(np.full((2, 512), np.nan, np.float32), on_bad_rows="skip")
    assert error(found.update(values).covariance, wanted) < 1e-7
    zeros = collected(np.zeros((5, 512), np.float32), on_bad_rows="zero")
    assert zeros == zeros.copy()
    assert not zeros.covariance.any()
    unit = np.concatenate([np.zeros((5, 512)), values / np.linalg.norm(values.astype(np.float64), axis=1)[:, None]])
    wanted = np.cov(unit.T, ddof=0)
    assert error(zeros.update(values).covariance, wanted) < 1e-7
    assert (
        error((collected(values) + collected(np.zeros((5, 512), np.float32), on_bad_rows="zero")).covariance, wanted)
        < 1e-7
    )


def test_the_same_bits_for_any_number_of_threads():
    values = make(3000, 130)
    assert collected(values, num_threads=1) == collected(values, num_threads=4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=4), st.integers(0, 3))
def test_any_split_merged_equals_the_whole(cuts, seed):
    values = make(700, 64, seed)
    parts = [collected(part) for part in np.split(values, sorted(cuts))]
    whole = collected(values)
    for order in (parts, parts[::-1]):
        merged = sum(order, rf.Moments(64, covariance=True))
        assert merged.count == whole.count
        np.testing.assert_array_equal(merged.mean, whole.mean)
        assert error(merged.covariance, whole.covariance) < 1e-7
    rest = whole - parts[0]
    np.testing.assert_array_equal(
        rest.mean if rest.count else 0, sum(parts[1:], rf.Moments(64, True)).mean if rest.count else 0
    )
    if rest.count > 1:
        wanted = sum(parts[1:], rf.Moments(64, covariance=True)).covariance
        # What is left of few rows keeps the rounding of many.
        assert np.linalg.norm(rest.covariance - wanted) < 1e-7 * np.linalg.norm(wanted) * whole.count / rest.count


def test_a_split_of_about_as_many_rows_as_dimensions():
    values = make(1000, 768)
    whole = collected(values)
    merged = collected(values[:100]) + collected(values[100:600]) + collected(values[600:])
    assert error(merged.covariance, whole.covariance) < 1e-7


def test_empty_parts_change_nothing():
    empty, some = rf.Moments(20, covariance=True), collected(make(50, 20))
    assert empty + some == some
    assert some + empty == some
    assert some - empty == some
    assert (some - some).count == 0
    assert some - some == empty
    assert empty.merge(empty).count == 0


def test_it_is_a_value():
    found = collected(make(30, 20))
    assert found == copy.deepcopy(found) == found.copy() == pickle.loads(pickle.dumps(found))
    assert found != collected(make(30, 20, seed=1))
    assert found != rf.Moments(20).update(make(30, 20))
    assert repr(found) == "Moments(dim=20, count=30, covariance=True)"


@pytest.mark.parametrize("count", [40, 70_000])  # looked at first, and taken back
def test_an_error_leaves_everything_as_it_was(count):
    values = make(count, 64)
    started = collected(make(30, 64, seed=1))
    before = started.copy()
    values[count - 3, 5] = np.nan
    with pytest.raises(ValueError, match=f"row {count - 3} "):
        started.update(values)
    assert started == before
    fresh = rf.Moments(64, covariance=True)
    with pytest.raises(ValueError, match=f"row {count - 3} "):
        fresh.update(values)
    assert fresh == rf.Moments(64, covariance=True)


def test_bad_rows_left_out_and_counted_as_zeros():
    values = make(60, 20)
    values[[3, 17]] = 0
    values[40, 2] = np.inf
    unit = reference.project(np.delete(values, [3, 17, 40], axis=0).astype(np.float64))
    skipped = collected(values, on_bad_rows="skip")
    assert error(skipped.covariance, np.cov(unit.T, ddof=0)) < SLACK
    zeroed = collected(values, on_bad_rows="zero")
    assert (zeroed.count, zeroed.num_zero) == (60, 3)
    assert error(zeroed.covariance, np.cov(np.concatenate([unit, np.zeros((3, 20))]).T, ddof=0)) < SLACK
    nothing = collected(np.zeros((5, 20), np.float32), on_bad_rows="zero")
    assert not nothing.covariance.any()


def test_what_was_not_collected_says_which_flag_collects_it():
    with pytest.raises(ValueError, match=r"covariance=True.*realign stats --covariance"):
        _ = rf.Moments(3).update(np.eye(3)).covariance
    with pytest.raises(ValueError, match="no rows"):
        _ = rf.Moments(3, covariance=True).covariance
    with pytest.raises(ValueError, match=r"with and without a covariance.*--covariance"):
        rf.Moments(3).merge(rf.Moments(3, covariance=True))
    with pytest.raises(ValueError, match="precision must be one of exact, high, fast, got 'low'"):
        rf.Moments(3, covariance=True, precision="low")


def test_save_and_load(tmp_path):
    path = tmp_path / "m.safetensors"
    for found in (collected(make(30, 20)), rf.Moments(20, covariance=True, precision="exact")):
        found.save(path)
        loaded = rf.Moments.load(path)
        assert loaded == found
        assert loaded.precision == found.precision


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    found = collected(make(30, 20))
    found.save(path)
    tensors, fields = _files.load(path, "moments", {})
    del fields["format"], fields["kind"], fields["package"]
    for changed, message in [
        ({"products": tensors["products"][:5]}, "must have shapes"),
        ({"products": tensors["products"].astype(np.float32)}, "must be float64"),
        ({"products": 2 * tensors["products"]}, "do not fit together"),
        ({"products": tensors["products"] * np.nan}, "not finite"),
        ({"pilot": tensors["pilot"][:3]}, "must have shapes"),
    ]:
        _files.save(path, "moments", tensors | changed, fields, version=2)
        with pytest.raises(ValueError, match=message):
            rf.Moments.load(path)
    _files.save(path, "moments", tensors, fields | {"precision": 3}, version=2)
    with pytest.raises(ValueError, match="precision must be one of"):
        rf.Moments.load(path)
