"""The Triton kernels against the oracle, through Triton's interpreter: `TRITON_INTERPRET=1 pytest` runs these."""

import mmap
import os

import numpy as np
import pytest
import torch

import realign_fast as rf
from realign_fast import reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # that of Triton 3.6
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, and then no kernel can be compiled"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy speaks up where a GPU stays silent
]
if os.environ.get("TRITON_INTERPRET") == "1":
    from realign_fast.kernels import _rows, _tuning
    from realign_fast.kernels import moments as moments_kernels
    from realign_fast.kernels import row_transform as kernels

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# One rounding to the dtype of the result, of values up to 1.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2e-7}
# Less than a vector, odd, below and above the fused form's limit, not a power of two, the papers'.
DIMS = [1, 3, 63, 64, 127, 255, 768, 1280]


def make(count, dim, dtype=torch.float32, seed=0):
    rows = reference.project(np.random.default_rng(seed).normal(0.05, 1, (count, dim)))
    return torch.from_numpy(rows).to(dtype)


def make_map(dim, seed=1):
    rng = np.random.default_rng(seed)
    return 1.2, 0.5 * rng.normal(size=dim) / np.sqrt(dim), 0.1 * rng.normal(size=dim) / np.sqrt(dim)


def maps_of(*mappings):
    return kernels.Maps.of(*(torch.from_numpy(np.stack(values)) for values in zip(*mappings, strict=True)))


def transform(x, *mappings, domain=None, out=None, dtype=None):
    if out is None:
        out = torch.full(x.shape, float("nan"), dtype=dtype or x.dtype)
    bad = _rows.new_bad_rows(x.device)
    kernels.row_transform(x, out, maps_of(*mappings), bad, domain)
    return out, _rows.read_bad_rows(bad)


def expected(x, mapping):
    return reference.row_transform(x.double().numpy(), *mapping)


def assert_close(out, wanted):
    np.testing.assert_allclose(out.double().numpy(), wanted, rtol=0, atol=ROUNDING[out.dtype])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 65])
def test_rows_of_any_dimension_and_dtype(dim, dtype, count):
    x = make(count, dim, dtype)
    out, bad = transform(x, make_map(dim))
    assert_close(out, expected(x, make_map(dim)))
    assert bad == (0, 0, -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_too_long_for_registers(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "MAX_BLOCK_D", 256)
    monkeypatch.setattr(_tuning, "MAX_BLOCK_D", 256)
    monkeypatch.setattr(_tuning, "_WIDE_BLOCK_D", 256)
    x = make(19, 1100, dtype)
    x[3] = 0
    x[7, 1099] = float("inf")
    out, bad = transform(x, make_map(1100))
    assert_close(out, expected(x, make_map(1100)))
    assert bad == (1, 1, 3)


@pytest.mark.parametrize("dim", [5, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_rows_become_zeros_and_are_counted(dim, dtype):
    x = make(70, dim, dtype)
    x[11], x[40] = 0, 0
    x[8, dim - 1], x[9, 0], x[69, 2] = float("nan"), float("inf"), float("-inf")
    out, bad = transform(x, make_map(dim))
    assert bad == (2, 3, 8)
    assert not out[[8, 9, 11, 40, 69]].any()
    assert_close(out, expected(x, make_map(dim)))


def test_half_rows_whose_squares_overflow():
    x = make(6, 200, torch.float32).mul(60000 / make(6, 200).abs().max()).half()
    assert_close(transform(x, make_map(200))[0], expected(x, make_map(200)))


def test_rows_opposite_to_the_shift_are_computed_in_float64():
    x = make(5, 128)
    scale = 1.0
    shift = -(1 - 1e-4) * x[2].double().numpy()
    mapping = scale, shift, make_map(128)[2]
    out, _ = transform(x, mapping)
    assert_close(out, expected(x, (scale, shift, mapping[2])))


def test_each_row_is_mapped_by_its_domain():
    mappings = [make_map(96, seed) for seed in range(5)]
    x = make(40, 96)
    x[4] = 0
    domain = torch.from_numpy(np.random.default_rng(3).integers(0, 5, 40))
    out, bad = transform(x, *mappings, domain=domain)
    wanted = np.concatenate([expected(x[i : i + 1], mappings[domain[i]]) for i in range(40)])
    assert_close(out, wanted)
    assert bad == (1, 0, 4)


def test_in_place_and_strided_rows():
    x, mapping = make(33, 80), make_map(80)
    x[5] *= 1e-30
    wanted = expected(x, mapping)
    wide = torch.zeros(33, 100)
    wide[:, 10:90] = x
    assert_close(transform(wide[:, 10:90], mapping)[0], wanted)
    transform(x, mapping, out=wide[:, 10:90])
    assert_close(wide[:, 10:90], wanted)
    assert not wide[:, :10].any()
    assert not wide[:, 90:].any()
    transform(x, mapping, out=x)
    assert_close(x, wanted)


@pytest.mark.parametrize("dim", [64, 5])
def test_rows_further_apart_than_32_bits_reach(dim):
    far = (1 << 31) + 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE: memory for what is touched alone
    memory = mmap.mmap(-1, 4 * (far + dim), flags=flags)
    apart = torch.frombuffer(memory, dtype=torch.float32).as_strided((2, dim), (far, 1))
    apart[:] = make(2, dim)
    wanted, grad_out = expected(apart, make_map(dim)), make(2, dim, seed=7)
    np.testing.assert_array_equal(sums_of(apart)[0], sums_of(apart.clone())[0])
    assert_gradients_close(gradient(apart, grad_out, make_map(dim)), apart, grad_out, make_map(dim))
    transform(apart, make_map(dim), out=apart)
    assert_close(apart, wanted)


def test_no_rows():
    assert transform(make(0, 8), make_map(8))[1][:2] == (0, 0)


def test_the_public_transform_goes_through_triton_where_asked():
    text, image = make(300, 70, seed=4), make(300, 70, seed=5) - 0.1
    alignment = rf.fit(text, image)
    x = text[:24].reshape(2, 3, 4, 70)
    wanted = alignment.transform(x)
    for dtype in DTYPES:
        out = alignment.transform(x.to(dtype), backend="triton")
        assert out.dtype == dtype
        np.testing.assert_allclose(out.double(), wanted.double(), rtol=0, atol=4 * ROUNDING[dtype])
    transposed = text.T.contiguous().T[:50]
    np.testing.assert_allclose(
        alignment.transform(transposed, backend="triton"), alignment.transform(transposed), rtol=0, atol=4e-7
    )
    in_place = x.clone()
    assert alignment.transform(in_place, out=in_place, backend="triton") is in_place
    bad = x.clone()
    bad[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="row 23 is bad"):
        alignment.transform(bad, backend="triton")
    assert not alignment.transform(bad, backend="triton", on_bad_rows="zero")[1, 2, 3].any()
    with pytest.raises(ValueError, match="backend 'triton' takes float16, bfloat16 and float32, got float64"):
        alignment.transform(x.double(), backend="triton")
    with pytest.raises(TypeError, match="backend 'triton' takes torch tensors, got ndarray"):
        alignment.transform(x.numpy(), backend="triton")


def gradient(x, grad_out, mapping):
    grad_x = torch.full(x.shape, float("nan"), dtype=x.dtype)
    kernels.row_transform_backward(x, grad_out, grad_x, maps_of(mapping))
    return grad_x


def assert_gradients_close(found, x, grad_out, mapping):
    wanted = reference.row_transform_backward(x.double().numpy(), grad_out.double().numpy(), *mapping)
    largest = np.abs(wanted).max(axis=1, keepdims=True)
    # One rounding to the dtype (the interpreter cuts bfloat16 off), and some roundings of float32 on the way.
    slack = 2 * ROUNDING[found.dtype] + 2e-6
    floor = 1e-9 if x.shape[1] == 1 else 0  # of one element, the gradient is zero
    assert (np.abs(found.double().numpy() - wanted) <= slack * largest + floor).all()


def test_gradients_of_rows_too_long_for_registers(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_BLOCK_D", 256)
    monkeypatch.setattr(kernels, "_WIDE_CHUNK_D", 256)
    x, grad_out = make(9, 700), make(9, 700, seed=7)
    x[3] = 0
    assert_gradients_close(gradient(x, grad_out, make_map(700)), x, grad_out, make_map(700))


def test_gradients_of_bad_extreme_and_opposite_rows():
    x, grad_out, mapping = make(20, 130), make(20, 130, seed=7), make_map(130)
    x[4], x[5, 3], x[6, 100] = 0, float("nan"), float("inf")
    x[7] *= 1e25
    x[8] *= 1e-10
    mapping = 1.0, -(1 - 1e-3) * reference.project(x[9:10].double().numpy())[0], mapping[2]
    found = gradient(x, grad_out, mapping)
    assert not found[4:7].any()
    assert_gradients_close(found, x, grad_out, mapping)


def test_gradients_of_strided_rows():
    wide, grad_out = torch.zeros(11, 200), make(22, 90, seed=7)[::2]
    wide[:, 40:130] = make(11, 90)
    found = gradient(wide[:, 40:130], grad_out, make_map(90))
    assert_gradients_close(found, wide[:, 40:130], grad_out, make_map(90))


def sums_of(x):
    sums, bad = torch.zeros(x.shape[1], dtype=torch.int64), _rows.new_bad_rows(x.device)
    moments_kernels.moments(x, sums, bad)
    return sums.numpy(), _rows.read_bad_rows(bad)


def mean_tolerance(count):
    """Each element of a mean lies within this of the exact one."""
    return 1e-9 + 8e-8 / np.sqrt(count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_rows_too_long_for_registers(monkeypatch, dtype):
    monkeypatch.setattr(moments_kernels, "MAX_BLOCK_D", 256)
    x = make(30, 700, dtype)
    x[29, 699], x[4] = float("nan"), 0
    sums, bad = sums_of(x)
    count, mean, _ = reference.moments(x.double().numpy())
    np.testing.assert_allclose(sums / 2.0**27 / count, mean, rtol=0, atol=mean_tolerance(count))
    assert bad == (1, 1, 4)


def test_moments_have_the_same_bits_in_any_order_and_chunking():
    x = make(101, 130)
    sums, _ = sums_of(x)
    np.testing.assert_array_equal(sums_of(x.flip(0))[0], sums)
    parts = [sums_of(part)[0] for part in x.split([1, 9, 50, 41])]
    np.testing.assert_array_equal(sum(parts), sums)


def test_moments_leave_bad_rows_out_and_take_rows_of_any_magnitude():
    x = make(40, 77)
    x[3], x[20, 5], x[21, 76] = 0, float("inf"), float("nan")
    x[7] *= 1e-30
    x[8] *= 1e30
    x[9] = 0
    x[9, 0] = 1e-45
    sums, bad = sums_of(x)
    count, mean, _ = reference.moments(x.double().numpy())
    np.testing.assert_allclose(sums / 2.0**27 / count, mean, rtol=0, atol=mean_tolerance(count))
    assert bad == (1, 2, 3)


def keys_of(x):
    keys = torch.full((len(x),), -1)
    moments_kernels.moments(x, torch.zeros(x.shape[1], dtype=torch.int64), _rows.new_bad_rows(x.device), keys=keys)
    return keys


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_keys_say_what_a_row_holds(monkeypatch, dtype, wide):
    if wide:
        monkeypatch.setattr(moments_kernels, "MAX_BLOCK_D", 64)
    x = make(300, 90, dtype)
    x[7], x[8, 89] = 0, float("nan")
    x[9] = x[200]
    x[10] = x[200]
    x[10, 5] += 0.25
    x[11] *= 1e-4
    keys = keys_of(x)
    assert keys[7] == keys[8] == 0
    assert keys[9] == keys[200]
    assert len(keys.unique()) == 298
    np.testing.assert_array_equal(keys_of(x[100:].flip(0)), keys[100:].flip(0))
    # The sample takes those below a bound: half of them must lie in the lower half.
    below = (keys.numpy().view(np.uint64) < 1 << 63).sum()
    assert 110 < below < 190


def test_the_first_bad_row_is_numbered_in_the_whole():
    x = make(9, 20)
    x[5] = 0
    bad = _rows.new_bad_rows(x.device)
    for first in (7_000_000_000, 40):
        moments_kernels.moments(x, torch.zeros(20, dtype=torch.int64), bad, first)
    assert _rows.read_bad_rows(bad) == (2, 0, 45)


@pytest.mark.parametrize("dim", [3, 70, 255, 768])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_moments_of_mapped_rows(monkeypatch, dim, dtype, wide):
    if wide:
        monkeypatch.setattr(moments_kernels, "MAX_BLOCK_D", 2)
    x = make(45, dim, dtype)
    x[3], x[7, 1] = 0, float("inf")
    x[8] *= 1e-4
    sums, bad = torch.zeros(dim, dtype=torch.int64), _rows.new_bad_rows(x.device)
    moments_kernels.transformed_moments(x, maps_of(make_map(dim)), sums, bad, 100)
    np.testing.assert_allclose(sums / 2.0**27, expected(x, make_map(dim)).sum(axis=0), rtol=0, atol=45 * 2e-7)
    assert _rows.read_bad_rows(bad) == (1, 1, 3 if wide else 103)


def test_sums_of_equal_rows_do_not_overflow():
    x = torch.zeros(64, 20)
    x[:, 3] = -1
    np.testing.assert_array_equal(sums_of(x)[0][[3, 4]], [-64 << 27, 0])


def test_the_public_moments_go_through_triton_where_asked():
    x = make(50, 33).reshape(5, 10, 33)
    moments = rf.Moments(33).update(x, backend="triton")
    plain = rf.Moments(33).update(x)
    assert moments.count == 50
    np.testing.assert_allclose(moments.mean, plain.mean, rtol=0, atol=2**-27)
    x[1, 2] = 0
    with pytest.raises(ValueError, match="row 12 is bad"):
        moments.update(x, backend="triton")
    assert moments.count == 50
    moments.update(x, backend="triton", on_bad_rows="skip")
    assert (moments.count, moments.num_skipped) == (99, 1)
    with pytest.raises(ValueError, match="rows of dimension 33, got shape"):
        moments.update(x[..., :5], backend="triton")
    with pytest.raises(ValueError, match="got 'torch'"):
        moments.update(x, backend="torch")


def test_the_public_bank_goes_through_triton_where_asked():
    fits = {str(seed): rf.fit(make(90, 70, seed=seed), make(90, 70, seed=seed + 9) - 0.1) for seed in range(3)}
    bank = rf.AlignmentBank(fits)
    x, domain = make(24, 70, seed=30), np.random.default_rng(0).integers(0, 3, 24)
    out = bank.transform(x, domain, backend="triton")
    np.testing.assert_allclose(out, bank.transform(x, domain), rtol=0, atol=4e-7)
