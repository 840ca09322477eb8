"""The Triton kernels that multiply matrices against the oracle, as in `test_triton_values.py`."""

import os

import numpy as np
import pytest
import torch

from realign_fast import reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # that of Triton 3.6
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, and then no kernel can be compiled"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy speaks up where a GPU stays silent
]
if os.environ.get("TRITON_INTERPRET") == "1":
    import triton
    import triton.language as tl
    from realign_fast.kernels import _rows, _tuning, whitening
    from realign_fast.kernels import covariance as kernels
    from triton.runtime.interpreter import InterpreterBuilder

    @triton.jit
    def _positions_kernel(out_ptr, ratio: tl.constexpr, count: tl.constexpr):
        tiles = tl.arange(0, count)
        tile_m, tile_n = kernels._tile_position(tiles, ratio)
        tl.store(out_ptr + 2 * tiles, tile_m)
        tl.store(out_ptr + 2 * tiles + 1, tile_n)


DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# float32 rows in each precision, the others in one.
MULTIPLIED = [(torch.float32, precision) for precision in ("exact", "high", "fast")]
MULTIPLIED += [(torch.float16, "high"), (torch.bfloat16, "high")]
# Less than a vector, odd, not a multiple of any tile, less and more than a tile.
DIMS = [1, 3, 63, 127, 255, 300]
# Relative to the sum of the magnitudes of all terms: some roundings of float32 on the way to a term, and of the sums.
FLOAT32_SLACK = 1e-6
# A factor rounded to the dtype, as torch does it. The interpreter cuts bfloat16 off, that is twice as much.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}
CUT_OFF = {**ROUNDING, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _products_of_values(monkeypatch):
    """Let the interpreter multiply bfloat16 operands by value: it holds them as bits, and would multiply these."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    create_dot = InterpreterBuilder.create_dot

    def create_dot_of_values(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot_of_values)


def make(count, dim, dtype=torch.float32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0.05, 1, (count, dim))).to(dtype)


def make_pilot(dim):
    return np.random.default_rng(1).normal(0.05, 0.02, dim)


def products_of(x, pilot, precision="high", start=None, first_row=0, bad=None):
    """Return what was added to `start`, of which the upper triangle must stay as it is."""
    dim = x.shape[1]
    start = np.random.default_rng(2).normal(size=(dim, dim)) if start is None else start
    products = torch.from_numpy(start.copy())
    bad = _rows.new_bad_rows(x.device) if bad is None else bad
    kernels.covariance(x, torch.from_numpy(pilot), products, bad, precision, first_row)
    above = np.triu_indices(dim, 1)
    np.testing.assert_array_equal(products.numpy()[above], start[above])
    return products.numpy() - start, _rows.read_bad_rows(bad)


def assert_products_close(found, x, pilot, precision="high"):
    rows = x.double().numpy()
    count, mean, covariance = reference.covariance(rows)
    wanted = count * (covariance + np.outer(mean - pilot, mean - pilot))
    unit = reference.project(rows[~reference.bad_rows(rows)])
    terms = (np.abs(unit) + np.abs(pilot)).T @ (np.abs(unit) + np.abs(pilot))
    cut = 2 * CUT_OFF[torch.bfloat16] * np.abs(unit - pilot).T @ np.abs(unit - pilot) if precision == "fast" else 0
    assert (np.tril(np.abs(found - wanted)) <= FLOAT32_SLACK * terms + 1.01 * cut + 1e-15).all()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("dtype", "precision"), MULTIPLIED)
def test_covariance_of_any_dimension_and_dtype(dim, dtype, precision):
    x = make(65, dim, dtype)
    found, bad = products_of(x, make_pilot(dim), precision)
    assert_products_close(found, x, make_pilot(dim), precision)
    assert bad == (0, 0, -1)


@pytest.mark.parametrize("precision", ["exact", "high", "fast"])
def test_covariance_of_one_row_and_of_none(precision):
    x, pilot = make(1, 40), np.zeros(40)
    assert_products_close(products_of(x, pilot, precision)[0], x, pilot, precision)
    assert not products_of(x[:0], pilot, precision)[0].any()


def test_covariance_is_added_up_over_calls():
    x, pilot = make(90, 33), make_pilot(33)
    bad = _rows.new_bad_rows(x.device)
    x[70] = 0
    first, _ = products_of(x[:50], pilot, bad=bad)
    both, counts = products_of(x[50:], pilot, start=first, first_row=7_000_000_050, bad=bad)
    assert_products_close(both + first, x, pilot)
    assert counts == (1, 0, 7_000_000_070)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["high", "fast"])
def test_covariance_leaves_bad_rows_out(dtype, precision):
    x = make(70, 80, dtype)
    x[11], x[40] = 0, 0
    x[8, 79], x[9, 0], x[69, 2] = float("nan"), float("inf"), float("-inf")
    found, bad = products_of(x, make_pilot(80), precision)
    assert_products_close(found, x, make_pilot(80), precision)
    assert bad == (2, 3, 8)


@pytest.mark.parametrize("factor", [1e-30, 1e-10, 1e30])
def test_covariance_of_rows_of_any_magnitude(factor):
    x = make(20, 50)
    x[3:9] *= factor
    assert_products_close(products_of(x, make_pilot(50))[0], x, make_pilot(50))


def test_covariance_of_strided_rows():
    wide = torch.full((33, 100), float("nan"))
    wide[:, 10:90] = make(33, 80)
    assert_products_close(products_of(wide[:, 10:90], make_pilot(80))[0], wide[:, 10:90], make_pilot(80))
    assert_products_close(products_of(wide[::3, 10:90], make_pilot(80))[0], wide[::3, 10:90], make_pilot(80))


@pytest.mark.parametrize(("precision", "dim"), [("exact", 140), ("high", 140), ("fast", 270)])
def test_covariance_of_many_chunks_shared_by_many_programs(monkeypatch, precision, dim):
    monkeypatch.setattr(kernels, "_FLOAT32_ROWS", 64)
    monkeypatch.setattr(kernels, "_WORKSPACE_BYTES", 1)
    monkeypatch.setattr(kernels, "count_processors", lambda device: 3)
    x = make(130, dim)
    x[129], x[100] = 0, 0
    assert kernels.plan_covariance(130, dim, x.device, precision).chunk_rows == 64
    found, bad = products_of(x, make_pilot(dim), precision, first_row=1000)
    assert_products_close(found, x, make_pilot(dim), precision)
    assert bad == (2, 0, 1100)


def test_covariance_of_rows_too_long_for_registers(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_BLOCK_D", 64)
    monkeypatch.setattr(_tuning, "MAX_BLOCK_D", 64)
    monkeypatch.setattr(_tuning, "_WIDE_BLOCK_D", 64)
    monkeypatch.setattr(kernels, "_WIDE_CHUNK_D", 64)
    x = make(9, 150)
    x[3], x[7, 149] = 0, float("inf")
    found, bad = products_of(x, make_pilot(150))
    assert_products_close(found, x, make_pilot(150))
    assert bad == (1, 1, 3)


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_every_tile_of_the_lower_triangle_has_its_number(ratio):
    count = 1 << 16
    found = torch.empty((count, 2), dtype=torch.int32)
    _positions_kernel[(1,)](found, ratio, count)
    wanted, row = [], 0
    while len(wanted) < count:
        wanted += [(row, col) for col in range(row // ratio + 1)]
        row += 1
    np.testing.assert_array_equal(found, np.array(wanted[:count]))


@pytest.mark.parametrize("precision", ["exact", "high", "fast"])
def test_the_tiles_of_a_plan_are_those_that_touch_the_lower_triangle(precision):
    for dim in range(1, 1400, 37):
        plan = kernels.plan_covariance(10_000, dim, torch.device("cpu"), precision)
        block_m, block_n, block_k = plan.tile[:3]
        touching = [min(row + block_m, dim) for row in range(0, dim, block_m)]
        assert plan.num_tiles == sum(-(-end // block_n) for end in touching)
        assert plan.width % block_n == plan.chunk_rows % block_k == 0


def make_matrix(dim_out, dim, factor=1.0):
    return factor * np.random.default_rng(3).normal(size=(dim_out, dim))


def whitened(x, matrix, mean, precision="high", dtype=None, out=None):
    if out is None:
        out = torch.full((len(x), len(matrix)), float("nan"), dtype=dtype or torch.float32)
    weights = whitening.Weights.of(torch.from_numpy(matrix), torch.from_numpy(mean), x.dtype, precision)
    bad = _rows.new_bad_rows(x.device)
    whitening.whiten(x, weights, out, bad, precision)
    return out, _rows.read_bad_rows(bad)


def assert_whitened_close(found, x, matrix, mean, precision="high"):
    rows = x.double().numpy()
    wanted = reference.whiten(rows, matrix, mean)
    bad = reference.bad_rows(rows)
    unit = reference.project(np.where(bad[:, None], 0, rows))
    dtype = whitening.product_dtype(x.dtype, precision)
    bound = FLOAT32_SLACK * (np.abs(unit) + np.abs(mean)) @ np.abs(matrix).T
    bound += 1.01 * ROUNDING[dtype] * np.abs(unit - mean) @ np.abs(matrix).T  # of the weights
    if dtype != x.dtype:
        bound += 1.01 * CUT_OFF[dtype] * np.abs(unit) @ np.abs(matrix).T  # of the rows
    bound += 1.01 * CUT_OFF[found.dtype] * (np.abs(wanted) + bound)  # of the result
    # Weights that float16 holds as whole numbers of its least, at most half of one off each.
    bound += np.abs(matrix).max() * 2**-24 * np.abs(unit - mean).sum(axis=1, keepdims=True)
    assert (np.abs(found.double().numpy() - wanted) <= bound).all()
    assert not found[torch.from_numpy(bad)].any()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("dtype", "precision"), MULTIPLIED)
def test_whitening_of_any_dimension_and_dtype(dim, dtype, precision):
    x, matrix = make(65, dim, dtype), make_matrix(dim, dim)
    out, bad = whitened(x, matrix, make_pilot(dim), precision)
    assert_whitened_close(out, x, matrix, make_pilot(dim), precision)
    assert bad == (0, 0, -1)


@pytest.mark.parametrize(("dim", "dim_out"), [(70, 3), (3, 70), (20, 300)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_whitening_to_another_dimension(dim, dim_out, count):
    x, matrix = make(count, dim), make_matrix(dim_out, dim)
    assert_whitened_close(whitened(x, matrix, make_pilot(dim))[0], x, matrix, make_pilot(dim))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whitening_any_dtype_to_any_other(dtype, out_dtype):
    x, matrix = make(9, 100, dtype), make_matrix(100, 100)
    assert_whitened_close(whitened(x, matrix, make_pilot(100), dtype=out_dtype)[0], x, matrix, make_pilot(100))


@pytest.mark.parametrize(("dtype", "precision"), MULTIPLIED)
def test_whitening_makes_zeros_of_bad_rows_and_counts_them_once(dtype, precision):
    x, matrix = make(70, 30, dtype), make_matrix(130, 30)
    x[11], x[40] = 0, 0
    x[8, 29], x[9, 0], x[69, 2] = float("nan"), float("inf"), float("-inf")
    out, bad = whitened(x, matrix, make_pilot(30), precision)
    assert_whitened_close(out, x, matrix, make_pilot(30), precision)
    assert bad == (2, 3, 8)


@pytest.mark.parametrize("precision", ["exact", "high", "fast"])
def test_whitening_of_rows_of_any_magnitude(precision):
    x, matrix = make(20, 130), make_matrix(50, 130)
    x[3] *= 1e-30
    x[4] *= 1e30
    x[5] *= 1e-10
    x[6] = 0
    x[6, 7] = 1e-45
    out, bad = whitened(x, matrix, make_pilot(130), precision)
    assert_whitened_close(out, x, matrix, make_pilot(130), precision)
    assert bad == (0, 0, -1)


def test_whitening_of_half_rows_whose_squares_overflow():
    x, matrix = make(6, 200).mul(60000 / make(6, 200).abs().max()).half(), make_matrix(30, 200)
    assert_whitened_close(whitened(x, matrix, make_pilot(200))[0], x, matrix, make_pilot(200))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_whitening_with_weights_that_float16_does_not_hold(dtype, factor):
    x, matrix = make(20, 40, dtype), make_matrix(40, 40, factor)
    assert_whitened_close(whitened(x, matrix, make_pilot(40))[0], x, matrix, make_pilot(40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_leave_no_shift(dtype):
    mean, matrix = np.full(64, 0.125), make_matrix(40, 64)
    out, _ = whitened(torch.ones(3, 64, dtype=dtype), matrix, mean)
    np.testing.assert_allclose(out, np.zeros((3, 40)), rtol=0, atol=FLOAT32_SLACK * np.abs(matrix).sum(axis=1).max())


def test_whitening_of_no_weights():
    out, _ = whitened(make(5, 20), np.zeros((10, 20)), make_pilot(20))
    assert not out.any()


def test_whitening_of_strided_rows():
    wide, out = torch.full((33, 100), float("nan")), torch.zeros(33, 60)
    wide[:, 10:90] = make(33, 80)
    x, matrix = wide[::2, 10:90], make_matrix(40, 80)
    x[5] *= 1e-30
    whitened(x, matrix, make_pilot(80), out=out[::2, 10:50])
    assert_whitened_close(out[::2, 10:50], x, matrix, make_pilot(80))
    assert not out[1::2].any()
    assert not out[:, :10].any()
    assert not out[:, 50:].any()


def test_whitening_of_more_tiles_than_a_group():
    x, matrix = make(1200, 20), make_matrix(150, 20)
    assert_whitened_close(whitened(x, matrix, make_pilot(20))[0], x, matrix, make_pilot(20))
