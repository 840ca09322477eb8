"""What kernels compute, against the plain float64 version: the same tests for each instruction set and for Triton.

Under TRITON_INTERPRET=1 they run the Triton kernels, in Triton's interpreter, otherwise the C++ kernels.
"""

import os

import numpy as np
import pytest
import torch

from realign_fast import reference
from realign_fast._dtypes import DTYPES, Rows, storage, to_float64
from realign_fast._native import _C
from realign_fast._torch_rows import tensors_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from realign_fast.kernels import _rows
    from realign_fast.kernels import moments as moments_kernels
    from realign_fast.kernels import row_transform as row_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes with NumPy, which speaks up
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # that of Triton 3.6
]

# 1 and 3: shorter than a vector; 127, 255: no multiple of one; 1152, 4096: more than the first-level cache holds.
DIMS = (1, 3, 127, 255, 512, 768, 1024, 1152, 1280, 4096)
COUNTS = (0, 1, 63, 64, 65)  # around the blocks of eight rows, and none
NO_BAD_ROWS = (0, 0, -1)
# Half the last place of a unit row's largest element, with room for the sums behind it.
TOLERANCES = {"float16": 2.5e-4 + 2e-7, "bfloat16": 2e-3 + 2e-7, "float32": 2e-7, "float64": 1e-14}


class Cpp:
    """The C++ kernels."""

    dtypes = DTYPES
    tolerances = TOLERANCES
    step = 1

    def transform(self, rows, mapping, out, dtype):
        return _C.row_transform(rows.values, rows.bfloat16, out, dtype == "bfloat16", _C.RowMap(*mapping), 2)

    def gradient(self, rows, grad, mapping, out):
        arrays = rows.values, rows.bfloat16, grad.values, grad.bfloat16, out
        _C.row_transform_backward(*arrays, _C.RowMap(*mapping), 2)

    def moments(self, rows, sums, keys=None):
        return _C.moments(rows.values, rows.bfloat16, sums, keys, 2)

    def transformed_moments(self, rows, mapping, sums):
        row_map, mapped = _C.RowMap(*mapping), np.zeros(len(sums) + _C.NUM_FACTORS, np.int64)
        bad = _C.transformed_moments(rows.values, rows.bfloat16, row_map, mapped, 2)
        row_map.add_up(mapped, sums)
        return bad


class Triton:
    """The Triton kernels; the interpreter cuts bfloat16 off where a GPU rounds."""

    dtypes = DTYPES[:3]
    tolerances = TOLERANCES | {"bfloat16": 4e-3 + 2e-7}
    step = 61  # of what is exhaustive elsewhere

    def transform(self, rows, mapping, out, dtype):
        bad = _rows.new_bad_rows(torch.device("cpu"))
        row_kernels.row_transform(tensor(rows), tensor(Rows(out, dtype)), self.maps(mapping), bad)
        return _rows.read_bad_rows(bad)

    def gradient(self, rows, grad, mapping, out):
        target = tensor(Rows(out, rows.dtype))
        row_kernels.row_transform_backward(tensor(rows), tensor(grad), target, self.maps(mapping))

    def moments(self, rows, sums, keys=None):
        bad = _rows.new_bad_rows(torch.device("cpu"))
        found = None if keys is None else torch.from_numpy(keys.view(np.int64))
        moments_kernels.moments(tensor(rows), torch.from_numpy(sums), bad, keys=found)
        return _rows.read_bad_rows(bad)

    def transformed_moments(self, rows, mapping, sums):
        bad = _rows.new_bad_rows(torch.device("cpu"))
        moments_kernels.transformed_moments(tensor(rows), self.maps(mapping), torch.from_numpy(sums), bad)
        return _rows.read_bad_rows(bad)

    def maps(self, mapping):
        scale, shift, correction = mapping
        table = np.array([scale]), shift[None], correction[None]
        return row_kernels.Maps(*tensors_of(table, torch.device("cpu")))


@pytest.fixture(params=["triton"] if INTERPRETED else _C.instruction_sets())
def kernels(request):
    if INTERPRETED:
        yield Triton()
        return
    _C.use_instruction_set(request.param)
    yield Cpp()
    _C.use_instruction_set("auto")


def tensor(rows):
    if rows.bfloat16:
        return torch.from_numpy(rows.values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows.values)


def cast(values, dtype):
    if dtype == "bfloat16":
        narrow = torch.from_numpy(np.asarray(values, np.float32)).bfloat16()
        return Rows(narrow.view(torch.int16).numpy().view(np.uint16), dtype)
    return Rows(values.astype(storage(dtype)), dtype)


def make(count, dim, dtype="float32", seed=0):
    return cast(reference.project(np.random.default_rng(seed).normal(0.05, 1, (count, dim))), dtype)


def make_map(dim, seed=1):
    rng = np.random.default_rng(seed)
    return 1.2, 0.5 * rng.normal(size=dim) / np.sqrt(dim), 0.1 * rng.normal(size=dim) / np.sqrt(dim)


def transformed(kernels, rows, mapping, dtype):
    out = np.full(rows.values.shape, np.nan if dtype != "bfloat16" else 0x7FC0, storage(dtype))
    bad = kernels.transform(rows, mapping, out, dtype)
    return to_float64(Rows(out, dtype)), bad


def assert_transformed(kernels, rows, mapping, dtype=None):
    dtype = dtype or rows.dtype
    out, bad = transformed(kernels, rows, mapping, dtype)
    wanted = reference.row_transform(to_float64(rows), *mapping)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=kernels.tolerances[dtype])
    assert bad == NO_BAD_ROWS


def assert_moments(kernels, rows):
    sums = np.zeros(rows.values.shape[1], np.int64)
    assert kernels.moments(rows, sums) == NO_BAD_ROWS
    count, mean, _ = reference.moments(to_float64(rows))
    np.testing.assert_allclose(sums / 2.0**27 / count, mean, rtol=0, atol=1e-9 + 8e-8 / np.sqrt(count))


@pytest.mark.parametrize("dim", DIMS)
def test_float32_rows_of_every_shape(kernels, dim):
    for count in COUNTS:
        rows = make(count, dim)
        assert_transformed(kernels, rows, make_map(dim))
        if count:
            assert_moments(kernels, rows)


def test_many_rows(kernels):
    rows = make(10_007 if kernels.step == 1 else 2_003, 128)
    assert_transformed(kernels, rows, make_map(128))
    assert_moments(kernels, rows)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [3, 129])
def test_every_pair_of_dtypes(kernels, dtype, out_dtype, dim):
    if not {dtype, out_dtype} <= set(kernels.dtypes):
        pytest.skip("not a dtype of these kernels")
    rows = make(21, dim, dtype)
    assert_transformed(kernels, rows, make_map(dim), out_dtype)
    assert_moments(kernels, rows)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_mapped_rows_are_those_of_the_mapped_rows(kernels, dtype, corrected):
    if dtype not in kernels.dtypes:
        pytest.skip("not a dtype of these kernels")
    rows, (scale, shift, correction) = make(1000 if kernels.step == 1 else 200, 300, dtype), make_map(300)
    mapping = scale, shift, correction if corrected else np.zeros(300)
    assert_mapped_moments(kernels, rows, mapping)


def assert_mapped_moments(kernels, rows, mapping, atol=1e-8):
    sums = np.zeros(rows.values.shape[1], np.int64)
    assert kernels.transformed_moments(rows, mapping, sums) == NO_BAD_ROWS
    wanted = reference.row_transform(to_float64(rows), *mapping).mean(0)
    np.testing.assert_allclose(sums / 2.0**27 / len(rows.values), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("length", [0.5, 0.505, 0.51, 0.6, 0.9])
@pytest.mark.parametrize("scale", [0.2, 1.0, 1.7, 4.0])
def test_moments_of_rows_whose_parts_are_longer_than_they(kernels, scale, length):
    """Blocks of rows along one axis, of which the map leaves a piece of that length: their parts add up."""
    atol = 1e-7 * max(1, scale / length) ** 2  # of what is left where parts cancel, in float32
    rows = cast(np.tile(np.eye(1, 80), (24, 1)), "float16")
    for correction in (np.zeros(80), 1e-3 * np.eye(1, 80, 7)[0]):
        assert_mapped_moments(kernels, rows, (scale, (length - scale) * np.eye(1, 80)[0], correction), atol)


@pytest.mark.parametrize("scale", [0.01, 1.0, 70.0, 1e6])
def test_moments_of_mapped_rows_at_any_scale(kernels, scale):
    """At 70, as of texts that are nearly alike, what is left of a row is a seventieth of each of its parts."""
    count = 1000 if kernels.step == 1 else 100
    unit = reference.project(to_float64(make(count, 300)) * 0.01 + np.eye(1, 300))
    for shift in (np.zeros(300), -scale * unit.mean(0), 1 - scale * unit.mean(0)):
        atol = 3e-7 * max(1, (scale / np.linalg.norm(scale * unit + shift, axis=1)).max())
        assert_mapped_moments(kernels, cast(unit, "float32"), (scale, shift, np.zeros(300)), atol)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("exponent", [-150, -140, -126, -60, 0, 60, 120])
def test_any_magnitude(kernels, dtype, exponent):
    rows = cast(np.ldexp(np.random.default_rng(0).normal(size=(9, 130)), exponent), dtype)
    if dtype not in kernels.dtypes or not to_float64(rows).any(axis=1).all():
        pytest.skip("not a dtype of these kernels, or it vanishes there")
    if INTERPRETED and dtype == "bfloat16" and exponent == -126:
        pytest.skip("the interpreter misreads subnormal bfloat16")
    assert_transformed(kernels, rows, make_map(130))
    assert_moments(kernels, rows)


@pytest.mark.parametrize("dim", [64, 768])
def test_rows_that_the_map_takes_near_the_origin(kernels, dim):
    """The float32 form cancels there: those rows go the long way."""
    rows = make(50, dim)
    for factor in (-1.0, -0.999, -0.6):
        assert_transformed(kernels, rows, (1.0, factor * to_float64(rows)[7], np.zeros(dim)))
        assert_transformed(kernels, rows, (1.0, np.zeros(dim), factor * to_float64(rows)[7]))
        assert_mapped_moments(kernels, rows, (1.0, factor * to_float64(rows)[7], np.zeros(dim)), 3e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, 200])
def test_bad_rows_are_counted_and_become_zeros(kernels, dtype, dim):
    if dtype not in kernels.dtypes:
        pytest.skip("not a dtype of these kernels")
    values = to_float64(make(40, dim))
    values[4, 1], values[11, dim - 1], values[12, 0], values[20] = np.nan, np.inf, -np.inf, 0
    rows, bad = cast(values, dtype), [4, 11, 12, 20]
    out, counts = transformed(kernels, rows, make_map(dim), dtype)
    assert counts == (1, 3, 4)
    assert not out[bad].any()
    sums, of_good, mapped = (np.zeros(dim, np.int64) for _ in range(3))
    keys = np.ones(40, np.uint64)
    assert kernels.moments(rows, sums, keys) == (1, 3, 4)
    kernels.moments(cast(np.delete(values, bad, axis=0), dtype), of_good)
    np.testing.assert_array_equal(sums, of_good)
    assert np.flatnonzero(keys == 0).tolist() == bad
    assert kernels.transformed_moments(rows, make_map(dim), mapped) == (1, 3, 4)


def assert_gradients(kernels, rows, grad, mapping, slack=2e-6):
    out = np.full(rows.values.shape, np.nan if not rows.bfloat16 else 0x7FC0, rows.values.dtype)
    kernels.gradient(rows, grad, mapping, out)
    wanted = reference.row_transform_backward(to_float64(rows), to_float64(grad), *mapping)
    largest = np.abs(wanted).max(axis=1, keepdims=True, initial=0)
    # One rounding to the dtype, some of float32 on the way; of one element, the gradient is zero.
    rounding = {"float64": 1e-12, "float32": slack}.get(rows.dtype, 4 * kernels.tolerances[rows.dtype] + slack)
    floor = 1e-9 if rows.values.shape[1] == 1 else 0
    assert (np.abs(to_float64(Rows(out, rows.dtype)) - wanted) <= rounding * largest + floor).all()


@pytest.mark.parametrize("dim", DIMS)
def test_gradients_of_every_shape(kernels, dim):
    for count in COUNTS:
        assert_gradients(kernels, make(count, dim), make(count, dim, seed=7), make_map(dim))


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [3, 129])
def test_gradients_of_every_pair_of_dtypes(kernels, dtype, grad_dtype, dim):
    if not {dtype, grad_dtype} <= set(kernels.dtypes):
        pytest.skip("not a dtype of these kernels")
    assert_gradients(kernels, make(21, dim, dtype), make(21, dim, grad_dtype, seed=7), make_map(dim))


@pytest.mark.parametrize("dim", [5, 200])
def test_gradients_of_bad_rows_are_zero(kernels, dim):
    rows = make(20, dim)
    rows.values[4], rows.values[5, 3], rows.values[6, dim - 1] = 0, np.nan, -np.inf
    assert_gradients(kernels, rows, make(20, dim, seed=7), make_map(dim))


@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
def test_gradients_of_any_magnitude(kernels, exponent):
    rows = Rows(np.ldexp(make(9, 130).values, exponent), "float32")
    assert_gradients(kernels, rows, make(9, 130, seed=7), make_map(130))


def test_gradients_of_rows_that_the_map_takes_near_the_origin(kernels):
    rows, grad = make(20, 130), make(20, 130, seed=7)
    for factor in (-0.999, -0.6):
        assert_gradients(kernels, rows, grad, (1.0, factor * to_float64(rows)[7], make_map(130)[2]))
        assert_gradients(kernels, rows, grad, (1.0, np.zeros(130), factor * to_float64(rows)[7]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_value_is_read_rightly(kernels, dtype):
    """Rows of one element and a one: their ratio shows what the element was read as."""
    bits = np.arange(0, 1 << 16, kernels.step, dtype=np.uint16)
    element = bits if dtype == "bfloat16" else bits.view(np.float16)
    one = cast(np.ones(1), dtype).values[0]
    rows = Rows(np.stack([element, np.full_like(element, one)], axis=1), dtype)
    with np.errstate(invalid="ignore"):
        values = to_float64(rows)
    wanted = reference.row_transform(values, 1.0, np.zeros(2), np.zeros(2))
    out, bad = transformed(kernels, rows, (1.0, np.zeros(2), np.zeros(2)), "float32")
    np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-38)
    assert bad[1] == (~np.isfinite(values[:, 0])).sum()
