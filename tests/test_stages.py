"""Maps of several steps, a matrix, two projections, noise, against the plain float64 version."""

import numpy as np
import pytest
import torch

import realign_fast as rf
from realign_fast import reference
from realign_fast._dtypes import DTYPES, Rows, storage, to_float64
from realign_fast._native import _C
from realign_fast._steps import Affine, Noise
from realign_fast._torch_rows import normals

# Rows around the block of a stage and its groups of eight; dimensions around vectors, panels and pieces of 192.
COUNTS = (0, 1, 7, 128, 129, 300)
SHAPES = ((1, 1), (3, 2), (48, 48), (65, 65), (200, 193), (768, 100))
ROUNDING = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 0, "float64": 0}


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request):
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set("auto")


def make(count, dim, dtype="float32", seed=0):
    values = np.random.default_rng(seed).normal(0.3, 1, (count, dim)) / np.sqrt(dim)
    if dtype == "bfloat16":
        return Rows((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), dtype)
    return Rows(values.astype(storage(dtype)), dtype)


def make_affine(dim, out_dim, seed=1):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(out_dim, dim)) / np.sqrt(dim)
    mean = rng.normal(size=dim) / np.sqrt(dim)
    return Affine.about(mean, matrix, rng.normal(size=out_dim) / np.sqrt(out_dim))


def make_correction(dim):
    return 0.1 * np.random.default_rng(2).normal(size=dim) / np.sqrt(dim)


def staged(rows, out_dim, out_dtype, affine=None, correction=None, noise=None, threads=2):
    out = np.full((len(rows.values), out_dim), np.nan if out_dtype != "bfloat16" else 0x7FC0, storage(out_dtype))
    row_map = None if correction is None else _C.RowMap(1.0, np.zeros(out_dim), correction)
    noise = noise or Noise(0.0, 0)
    bad = _C.staged_transform(
        rows.values, rows.bfloat16, out, out_dtype == "bfloat16", affine and affine.for_kernels, row_map,
        noise.std, noise.seed, noise.index, noise.first, threads,
    )  # fmt: skip
    return to_float64(Rows(out, out_dtype)), bad


def assert_close(found, wanted, dtype):
    np.testing.assert_allclose(found, wanted, rtol=ROUNDING[dtype], atol=2e-6)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("dim", "out_dim"), SHAPES)
def test_a_matrix_of_any_shape(instruction_set, count, dim, out_dim):
    rows, affine = make(count, dim), make_affine(dim, out_dim)
    found, bad = staged(rows, out_dim, "float32", affine)
    assert_close(found, reference.affine(to_float64(rows), affine.matrix, affine.offset), "float32")
    assert bad == (0, 0, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_every_dtype_with_every_step(instruction_set, dtype, out_dtype):
    rows, affine, correction = make(140, 72, dtype), make_affine(72, 70), make_correction(70)
    moved = reference.affine(to_float64(rows), affine.matrix, affine.offset)
    assert_close(staged(rows, 70, out_dtype, affine)[0], moved, out_dtype)
    mapped = reference.row_transform(moved, 1.0, np.zeros(70), correction)
    assert_close(staged(rows, 70, out_dtype, affine, correction)[0], mapped, out_dtype)
    noisy = reference.add_noise(mapped, 0.05, 9, list(range(140)))
    assert_close(staged(rows, 70, out_dtype, affine, correction, Noise(0.05, 9))[0], noisy, out_dtype)
    plain = reference.row_transform(to_float64(rows), 1.0, np.zeros(72), make_correction(72))
    noisy = reference.add_noise(plain, 0.05, 9, list(range(140)))
    assert_close(staged(rows, 72, out_dtype, None, make_correction(72), Noise(0.05, 9))[0], noisy, out_dtype)


def test_bad_and_extreme_rows(instruction_set):
    values = make(200, 66).values
    values[3], values[130, 5], values[131, 65] = 0, np.nan, np.inf
    values[7] *= np.float32(1e30)
    values[190] *= np.float32(1e-30)
    rows, affine, correction = Rows(values, "float32"), make_affine(66, 66), make_correction(66)
    for noise in (None, Noise(0.1, 1)):
        found, bad = staged(rows, 66, "float32", affine, correction, noise)
        assert bad == (1, 2, 3)
        assert not found[[3, 130, 131]].any()
        wanted = reference.row_transform(
            reference.affine(to_float64(rows), affine.matrix, affine.offset), 1.0, np.zeros(66), correction
        )
        if noise:
            wanted = reference.add_noise(wanted, 0.1, 1, list(range(200)))
        assert_close(found, wanted, "float32")
    mapped = np.zeros(66 + _C.NUM_FACTORS, np.int64)
    row_map = _C.RowMap(1.0, np.zeros(66), correction)
    assert _C.affine_moments(values, False, affine.for_kernels, row_map, mapped, 2) == (1, 2, 3)


@pytest.mark.parametrize("count", COUNTS)
def test_moments_of_mapped_rows(instruction_set, count):
    rows, affine, correction = make(count, 100), make_affine(100, 100), make_correction(100)
    mapped, sums = np.zeros(100 + _C.NUM_FACTORS, np.int64), np.zeros(100, np.int64)
    row_map = _C.RowMap(1.0, np.zeros(100), correction)
    _C.affine_moments(rows.values, False, affine.for_kernels, row_map, mapped, 3)
    row_map.add_up(mapped, sums)
    wanted, _ = staged(rows, 100, "float64", affine, correction)
    np.testing.assert_allclose(sums * 2.0**-27, wanted.sum(axis=0), atol=2e-7 * max(1, count))


def test_rows_are_replaced_in_place(instruction_set):
    rows, affine, correction = make(500, 50), make_affine(50, 50), make_correction(50)
    wanted, _ = staged(rows, 50, "float32", affine, correction, Noise(0.1, 3))
    row_map = _C.RowMap(1.0, np.zeros(50), correction)
    steps = affine.for_kernels, row_map, 0.1, 3, None, 0
    _C.staged_transform(rows.values, False, rows.values, False, *steps, 4)
    np.testing.assert_array_equal(rows.values, wanted)


def test_the_matrix_follows_the_instruction_set_that_is_chosen_later():
    rows, affine = make(20, 50), make_affine(50, 50)
    wanted, _ = staged(rows, 50, "float32", affine)
    for name in _C.instruction_sets():
        _C.use_instruction_set(name)
        assert_close(staged(rows, 50, "float32", affine)[0], wanted, "float32")
    _C.use_instruction_set("auto")


def test_a_row_far_from_the_centre_keeps_the_digits_of_the_difference(instruction_set):
    """Without centring first, a matrix of norm 1000 would leave 1e-4 of float32's rounding of the mean."""
    rng = np.random.default_rng(0)
    mean = rng.normal(size=80)
    unit = reference.project(mean + 1e-3 * rng.normal(size=(50, 80)))
    affine = Affine.about(unit.mean(axis=0), 1000 * np.eye(80), np.zeros(80))
    found, _ = staged(Rows(unit, "float64"), 80, "float32", affine)
    np.testing.assert_allclose(found, reference.affine(unit, affine.matrix, affine.offset), atol=3e-5)


# ---- Noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 4, 5, 64, 67, 130, 768])
@pytest.mark.parametrize("seed", [0, 7, (1 << 64) - 1])
def test_noise_is_that_of_the_counter(instruction_set, dim, seed):
    numbers = [0, 1, 5, (1 << 33) + 17, (1 << 62) + 3]
    rows = make(len(numbers), dim)
    unit = reference.project(to_float64(rows))
    noise = Noise(0.3, seed, np.array(numbers))
    found, _ = staged(rows, dim, "float32", None, np.zeros(dim), noise)
    wanted = reference.add_noise(unit, 0.3, seed, numbers)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    in_torch = normals(seed, torch.tensor(numbers), dim)
    np.testing.assert_allclose(in_torch.numpy(), reference.normals(seed, numbers, dim), atol=3e-6)


def test_philox_gives_the_words_its_authors_publish():
    """The known answers of Random123 for Philox 4x32-10."""
    ones = 0xFFFFFFFF
    assert reference.philox(0, (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert reference.philox((ones << 32) + ones, (ones,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def test_noise_is_gaussian():
    dim = 1000
    found, _ = staged(make(2000, dim), dim, "float32", None, np.zeros(dim), Noise(1e6, 5))
    z = found * np.sqrt(dim)
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 1e-3
    assert abs((z**4).mean() - 3) < 0.02
    assert abs((z**3).mean()) < 0.02
    neighbours = [(z[:, :-1] * z[:, 1:]).mean(), (z[:-1] * z[1:]).mean(), (z[:, :250] * z[:, 250:500]).mean()]
    assert np.abs(neighbours).max() < 6 / np.sqrt(z[:, :250].size)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_noise_does_not_depend_on_the_batch(dtype):
    x = make(300, 40, dtype).values
    alignment = rf.fit(make(50, 40, seed=1).values, make(50, 40, seed=2).values)
    whole = alignment.transform(x, noise_std=0.1, seed=3)
    parts = [alignment.transform(x[i : i + 37], noise_std=0.1, seed=3, index=i) for i in range(0, 300, 37)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    order = np.random.default_rng(0).permutation(300)
    shuffled = alignment.transform(x[order].reshape(3, 100, 40), noise_std=0.1, seed=3, index=order.reshape(3, 100))
    np.testing.assert_array_equal(shuffled.reshape(300, 40), whole[order])
    assert not np.array_equal(alignment.transform(x, noise_std=0.1, seed=4), whole)
    np.testing.assert_allclose(np.linalg.norm(whole.astype(np.float64), axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("method", ["realign", "ot"])
def test_backends_make_the_same_noise(method):
    options = {"strength": 0.5} if method == "ot" else {}
    alignment = rf.fit(make(90, 40, seed=1).values, make(90, 40, seed=2).values, method=method, **options)
    x = torch.from_numpy(make(60, 40).values)
    x[5] = 0
    arguments = {"noise_std": 0.1, "seed": 11, "index": torch.arange(60) * 1000, "on_bad_rows": "zero"}
    found = alignment.transform(x, backend="torch", **arguments)
    torch.testing.assert_close(found, alignment.transform(x, **arguments), atol=2e-6, rtol=0)
    double = alignment.transform(x.double(), backend="torch", **arguments)
    torch.testing.assert_close(double, alignment.transform(x.double(), **arguments), atol=2e-6, rtol=0)


def test_noise_that_is_none_is_refused():
    alignment = rf.fit(make(50, 40, seed=1).values, make(50, 40, seed=2).values)
    x = make(6, 40).values
    for arguments, error, message in [
        ({"noise_std": -1.0}, ValueError, "noise_std must be finite and at least 0, got -1"),
        ({"noise_std": np.nan}, ValueError, "noise_std must be finite"),
        ({"noise_std": 0.1, "seed": -1}, ValueError, "seed must be an integer from 0"),
        ({"noise_std": 0.1, "seed": 1.5}, ValueError, "seed must be an integer from 0"),
        ({"noise_std": 0.1, "index": np.arange(5)}, ValueError, r"shape \(6,\), got \(5,\)"),
        ({"noise_std": 0.1, "index": np.ones(6)}, TypeError, "index must be integers, got float64"),
    ]:
        with pytest.raises(error, match=message):
            alignment.transform(x, **arguments)


def test_arguments_that_do_not_fit_are_refused():
    x, affine = make(4, 6).values, make_affine(6, 5).for_kernels
    out = np.zeros((4, 5), np.float32)
    row_map = _C.RowMap(1.0, np.zeros(6), np.zeros(6))
    noise = 0.0, 0, None, 0, 1
    for arguments, message in [
        ((x, False, out, False, None, None, *noise), "must not both be None"),
        (
            (x, False, out, False, affine, row_map, *noise),
            "row_map must have the dimension that affine gives, 5, got 6",
        ),
        ((x, False, x, False, affine, None, *noise), r"out must have shape \(4, 5\), got \(4, 6\)"),
        ((x[:, :5].copy(), False, out, False, affine, None, *noise), "rows must have the dimension of affine, 6"),
        ((x, False, x, False, None, row_map, np.nan, 0, None, 0, 1), "noise_std must be finite"),
        ((x, False, x, False, None, row_map, 0.1, 0, np.arange(3), 0, 1), r"index must be contiguous of shape \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.staged_transform(*arguments)
    with pytest.raises(ValueError, match="out_dim from 1 to dim"):
        _C.AffineMap(np.zeros((7, 6)), np.zeros(6), np.zeros(7))
    with pytest.raises(ValueError, match="row_map must have the dimension"):
        _C.affine_moments(x, False, affine, row_map, np.zeros(5, np.int64), 1)
