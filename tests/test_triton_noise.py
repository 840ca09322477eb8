"""The Triton kernel of maps with noise, through Triton's interpreter: `TRITON_INTERPRET=1 pytest` runs these."""

import os

import numpy as np
import pytest
import torch

import realign_fast as rf
from realign_fast import reference

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, and then no kernel can be compiled"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy speaks up where a GPU stays silent
]
if os.environ.get("TRITON_INTERPRET") == "1":
    from realign_fast.kernels import _rows, noise
    from realign_fast.kernels._maps import Maps

# One rounding to the dtype of the result, of values up to 1; of float32 the noise too.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2e-6}
SEEDS = [0, 1, 2**32 + 5, 2**64 - 1]


def make(count, dim, dtype=torch.float32, seed=0):
    rows = reference.project(np.random.default_rng(seed).normal(0.05, 1, (count, dim)))
    return torch.from_numpy(rows).to(dtype)


def make_map(dim, seed=1):
    rng = np.random.default_rng(seed)
    return 1.2, 0.5 * rng.normal(size=dim) / np.sqrt(dim), 0.1 * rng.normal(size=dim) / np.sqrt(dim)


def transform(x, mapping, std, seed, numbers, out=None):
    if out is None:
        out = torch.full(x.shape, float("nan"), dtype=x.dtype)
    maps = Maps.of(*(torch.from_numpy(np.stack([value])) for value in mapping))
    bad = _rows.new_bad_rows(x.device)
    given = numbers if isinstance(numbers, int) else torch.tensor(numbers)
    noise.noisy_row_transform(x, out, maps, bad, std, seed, given)
    return out, _rows.read_bad_rows(bad)


def expected(x, mapping, std, seed, numbers):
    return reference.add_noise(reference.row_transform(x.double().numpy(), *mapping), std, seed, list(numbers))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 63, 64, 127, 255, 768, 1280])
def test_values_are_those_of_the_oracle(dim, dtype):
    x, mapping = make(21, dim, dtype), make_map(dim)
    out, bad = transform(x, mapping, 0.2, 7, 100)
    assert bad == (0, 0, -1)
    wanted = expected(x, mapping, 0.2, 7, range(100, 121))
    np.testing.assert_allclose(out.double().numpy(), wanted, rtol=0, atol=ROUNDING[dtype])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_whole_seed_and_the_whole_number_of_a_row_count(seed):
    x, mapping = make(5, 66), make_map(66)
    numbers = [0, 2**32, 2**31 - 1, -1, 2**63 - 1]
    out, _ = transform(x, mapping, 0.1, seed, numbers)
    unsigned = [number % 2**64 for number in numbers]
    np.testing.assert_allclose(out.numpy(), expected(x, mapping, 0.1, seed, unsigned), rtol=0, atol=2e-6)
    counted, _ = transform(x, mapping, 0.1, seed, 2**40)
    wanted = expected(x, mapping, 0.1, seed, range(2**40, 2**40 + 5))
    np.testing.assert_allclose(counted.numpy(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dim", [30, 100])
def test_rare_and_bad_rows(dim):
    x, mapping = make(40, dim), make_map(dim)
    x[3], x[17, 2], x[18, dim - 1] = 0, float("nan"), float("inf")
    x[5] *= 1e-30
    x[6] *= 1e30
    x[7] = 1e-42
    out, bad = transform(x, mapping, 0.1, 3, 0)
    assert bad == (1, 2, 3)
    good = [i for i in range(40) if i not in (3, 17, 18)]
    wanted = expected(x[good], mapping, 0.1, 3, good)
    np.testing.assert_allclose(out[good].numpy(), wanted, rtol=0, atol=2e-6)
    assert not out[[3, 17, 18]].any()


def test_in_place_strided_and_in_any_batch():
    x, mapping = make(70, 100), make_map(100)
    whole, _ = transform(x, mapping, 0.1, 3, 0)
    parts = [transform(x[i : i + 9], mapping, 0.1, 3, i)[0] for i in range(0, 70, 9)]
    assert torch.equal(torch.cat(parts), whole)
    order = np.random.default_rng(0).permutation(70)
    assert torch.equal(transform(x[order], mapping, 0.1, 3, order.tolist())[0], whole[order])
    wide = torch.zeros(70, 130)
    wide[:, :100] = x
    transform(wide[:, :100], mapping, 0.1, 3, 0, out=wide[:, :100])
    assert torch.equal(wide[:, :100], whole)
    assert not wide[:, 100:].any()


@pytest.mark.parametrize("method", ["c3", "realign", "ot", "whiten"])
@pytest.mark.parametrize("dim", [40, 96])
def test_a_transform_is_that_of_the_cpu(method, dim):
    options = {"strength": 0.5} if method == "ot" else {}
    alignment = rf.fit(make(120, dim, seed=1), make(120, dim, seed=2), method=method, backend="cpu", **options)
    x = make(60, dim)
    x[5] = 0
    arguments = {"noise_std": 0.1, "seed": 11, "index": torch.arange(60) * 1000, "on_bad_rows": "zero"}
    found = alignment.transform(x, backend="triton", **arguments)
    # The matrix multiplies in TF32.
    atol = 2e-6 if method in ("c3", "realign") else 2e-3
    torch.testing.assert_close(found, alignment.transform(x, backend="cpu", **arguments), atol=atol, rtol=0)


def test_rows_longer_than_a_program_holds():
    alignment = rf.fit(make(5, 4100, seed=1), make(5, 4100, seed=2), backend="cpu")
    x = make(3, 4100, torch.float16)
    found = alignment.transform(x, backend="triton", noise_std=0.01)
    torch.testing.assert_close(found, alignment.transform(x, backend="cpu", noise_std=0.01), atol=2**-11, rtol=0)
    with pytest.raises(ValueError, match="x must have at most 4096 columns, got 4100"):
        transform(x, make_map(4100), 0.1, 0, 0)
