import numpy as np
import pytest
import torch

import realign_fast as rf
from realign_fast import reference
from realign_fast._native import _C

DIM = 130
NAMES = ["general", "medical", "satellite", "sketch", "x"]


def values_of(count, seed, shift=0.0, dim=DIM):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dim)) + 0.7 * np.sin(np.arange(dim) + shift)).astype(np.float32)


@pytest.fixture(scope="module")
def bank():
    fits = (rf.fit(values_of(200, 2 * i, i), values_of(200, 2 * i + 1, i + 2)) for i in range(len(NAMES)))
    return rf.AlignmentBank(dict(zip(NAMES, fits, strict=True)))


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request):
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set("auto")


def expected(bank, x, domain):
    maps = [bank[name].parameters for name in NAMES]
    rows = [
        reference.row_transform(x[i : i + 1].astype(np.float64), maps[d].scale, maps[d].shift, maps[d].correction)
        for i, d in enumerate(domain)
    ]
    return np.concatenate(rows)


def domains_of(count, kind):
    if kind == "runs":  # pairs within a block and blocks cut by a change of map
        return np.sort(np.random.default_rng(1).integers(0, len(NAMES), count))
    return np.random.default_rng(2).integers(0, len(NAMES), count)


@pytest.mark.parametrize("kind", ["random", "runs"])
@pytest.mark.parametrize("count", [1, 7, 64, 65, 1003])
def test_each_row_is_mapped_by_its_domain(bank, instruction_set, count, kind):
    x, domain = values_of(count, 50), domains_of(count, kind)
    out = bank.transform(x, domain)
    np.testing.assert_allclose(out, expected(bank, x, domain), rtol=0, atol=2e-7)
    # The same bits as one alignment alone gives the row.
    for number, name in enumerate(NAMES):
        np.testing.assert_array_equal(out[domain == number], bank[name].transform(x)[domain == number])


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_do_not_change_the_bits(bank, num_threads):
    x, domain = values_of(9001, 51), domains_of(9001, "random")
    np.testing.assert_array_equal(
        bank.transform(x, domain, num_threads=num_threads), bank.transform(x, domain, num_threads=3)
    )


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_shapes_and_in_place(bank, dtype):
    x, domain = values_of(24, 52).astype(dtype), domains_of(24, "random")
    out = bank.transform(x.reshape(2, 3, 4, DIM), domain.reshape(2, 3, 4))
    assert out.shape == (2, 3, 4, DIM)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.reshape(24, DIM), expected(bank, x, domain), rtol=0, atol=1e-3)
    assert bank.transform(x, domain, out=x) is x
    np.testing.assert_array_equal(x, out.reshape(24, DIM))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_tensors_and_names(bank, backend):
    x, domain = torch.from_numpy(values_of(30, 53)), domains_of(30, "random")
    wanted = expected(bank, x.numpy(), domain)
    names = [NAMES[number] for number in domain]
    for each in (torch.from_numpy(domain), domain.astype(np.int32), domain.tolist(), names, np.array(names)):
        out = bank.transform(x, each, backend=backend)
        assert isinstance(out, torch.Tensor)
        np.testing.assert_allclose(out.numpy(), wanted, rtol=0, atol=5e-7)


def test_one_domain_for_all_rows(bank):
    x = values_of(9, 54)
    for domain in ("sketch", 3, np.int64(3)):
        np.testing.assert_array_equal(bank.transform(x, domain), bank["sketch"].transform(x))
    np.testing.assert_array_equal(bank.transform(x, "x", side="target"), bank["x"].transform(x, side="target"))
    np.testing.assert_allclose(
        bank.transform(x, domains_of(9, "random"), side="target"), bank["x"].transform(x, side="target"), atol=1e-7
    )


def test_bad_rows_are_named_or_become_zeros(bank):
    x, domain = values_of(20, 55), domains_of(20, "random")
    x[13, 4] = np.nan
    with pytest.raises(ValueError, match="row 13 is bad"):
        bank.transform(x, domain)
    assert not bank.transform(x, domain, on_bad_rows="zero")[13].any()


def test_it_is_a_mapping(bank):
    assert list(bank) == NAMES
    assert len(bank) == 5
    assert dict(bank)["x"] is bank["x"]
    assert repr(bank) == f"AlignmentBank({NAMES}, dim={DIM})"


def test_what_does_not_fit_is_refused(bank):
    x, domain = values_of(4, 56), np.zeros(4, int)
    for wrong, error, message in [
        ([0, 1, 5, 0], ValueError, r"domain must lie in \[0, 5\), got 5 for row 2"),
        ([0, -1, 0, 0], ValueError, "got -1 for row 1"),
        (["x", "y", "x", "x"], ValueError, "domain must be one of .* got 'y'"),
        ("y", ValueError, "got 'y'"),
        (5, ValueError, "got 5"),
        ([0, 1], ValueError, r"one entry a row, shape \(4,\), got \(2,\)"),
        ([0.0, 1.0, 0.0, 0.0], TypeError, "names or integers, got float64"),
    ]:
        with pytest.raises(error, match=message):
            bank.transform(x, wrong)
    with pytest.raises(ValueError, match="rows of dimension 130"):
        bank.transform(x[:, :9], domain)
    with pytest.raises(ValueError, match="at least one"):
        rf.AlignmentBank({})
    other = rf.fit(values_of(50, 1, dim=9), values_of(50, 2, 1.0, dim=9))
    with pytest.raises(ValueError, match="'general' has 130, 'small' has 9"):
        rf.AlignmentBank({"general": bank["general"], "small": other})
    row_map = bank["x"].parameters.row_map
    with pytest.raises(ValueError, match=r"domain must lie in \[0, 1\), got 1 for row 3"):
        _C.row_transform_by_domain(x, False, np.empty_like(x), False, [row_map], np.array([0, 0, 0, 1]), 1)
