"""Whitening against the plain float64 version."""

import numpy as np
import pytest
import torch

import realign_fast as rf
from realign_fast import _files, reference

DIM = 40
KINDS = ("zca", "pca", "cholesky")


def make(count, dim=DIM, seed=0):
    rng = np.random.default_rng(seed)
    scales = np.arange(1.0, dim + 1) ** -0.7
    return (0.5 + rng.normal(size=(count, dim)) * scales).astype(np.float32)


@pytest.fixture(scope="module")
def rows():
    return make(2000)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_uncorrelated_afterwards(rows, kind):
    whitener = rf.Whitener.fit(rows, kind)
    out = whitener.transform(rows)
    assert out.dtype == np.float32
    np.testing.assert_allclose(np.cov(out.T.astype(np.float64), ddof=0), np.eye(DIM), atol=2e-4)
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-4)
    wanted = reference.whiten(rows.astype(np.float64), whitener.matrix, whitener.mean)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    np.testing.assert_allclose(whitener.transform(rows.astype(np.float64)), wanted, rtol=0, atol=1e-10)
    assert repr(whitener) == f"Whitener(kind={kind!r}, dim=40, out_dim=40, count=2000)"


def test_the_kinds_are_what_they_are_called(rows):
    covariance = rf.Moments(DIM, covariance=True).update(rows).covariance
    zca, pca, cholesky = (rf.Whitener.fit(rows, kind).matrix for kind in KINDS)
    np.testing.assert_allclose(zca, zca.T, atol=1e-9 * np.abs(zca).max())
    directions = pca / np.linalg.norm(pca, axis=1, keepdims=True)
    variances = np.diag(directions @ covariance @ directions.T)
    assert (np.diff(variances) < 1e-12).all()
    assert (directions[np.arange(DIM), np.abs(directions).argmax(axis=1)] > 0).all()
    np.testing.assert_allclose(np.tril(cholesky, -1), 0, atol=1e-12)


def test_pca_agrees_with_faiss(rows):
    faiss = pytest.importorskip("faiss")
    unit = reference.project(rows.astype(np.float64)).astype(np.float32)
    peer = faiss.PCAMatrix(DIM, 10, -0.5)
    peer.train(unit)
    found = rf.Whitener.fit(rows, "pca", n_components=10).transform(rows)
    theirs = peer.apply(unit)
    signs = np.sign((found * theirs).sum(axis=0))
    # Its eigenvalues are those of the sum, not of the mean.
    np.testing.assert_allclose(found, theirs * signs * np.sqrt(len(rows)), rtol=0, atol=2e-2)


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.1, 1.0, "ledoit_wolf", "oas"])
def test_shrunken_covariances_become_the_identity(rows, shrinkage):
    whitener = rf.Whitener.fit(rows, "zca", shrinkage)
    covariance = rf.Moments(DIM, covariance=True).update(rows).covariance
    weight = whitener.shrinkage
    if not isinstance(shrinkage, str):
        assert weight == (shrinkage or 0)
    shrunk = (1 - weight) * covariance + weight * np.trace(covariance) / DIM * np.eye(DIM)
    np.testing.assert_allclose(whitener.matrix @ shrunk @ whitener.matrix.T, np.eye(DIM), atol=1e-9)


@pytest.mark.parametrize("count", [1, 5, DIM])
def test_fewer_components(rows, count):
    pca = rf.Whitener.fit(rows, "pca", n_components=count)
    whole = rf.Whitener.fit(rows, "pca")
    out = pca.transform(rows[:30])
    assert out.shape == (30, count)
    np.testing.assert_allclose(out, whole.transform(rows[:30])[:, :count], rtol=0, atol=1e-4)
    zca = rf.Whitener.fit(rows, "zca", n_components=count)
    assert zca.transform(rows[:30]).shape == (30, DIM)
    assert np.linalg.matrix_rank(zca.matrix) == count
    tensor = torch.from_numpy(rows[:30]).reshape(5, 6, DIM)
    for backend in ("cpu", "torch"):
        found = pca.transform(tensor, backend=backend)
        torch.testing.assert_close(found, torch.from_numpy(out).reshape(5, 6, count), rtol=0, atol=1e-4)
    target = np.empty((30, count), np.float16)
    assert pca.transform(rows[:30], out=target) is target
    np.testing.assert_allclose(target, out, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_the_inverse_gives_the_unit_rows_back(rows, kind, dtype):
    whitener = rf.Whitener.fit(rows, kind)
    unit = reference.project(rows[:50].astype(np.float64))
    tolerance = {np.float64: 1e-9, np.float32: 1e-5, np.float16: 3e-3}[dtype]
    white = whitener.transform(rows[:50].astype(np.float64)).astype(dtype)
    back = whitener.inverse_transform(white)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, unit, rtol=0, atol=tolerance)
    tensor = whitener.inverse_transform(torch.from_numpy(white).reshape(2, 25, DIM))
    np.testing.assert_allclose(tensor.reshape(50, DIM).numpy(), back, rtol=0, atol=tolerance)


def test_the_inverse_of_fewer_components_is_the_nearest(rows):
    for kind in ("pca", "zca"):
        whitener = rf.Whitener.fit(rows, kind, n_components=12)
        unit = reference.project(rows[:40].astype(np.float64))
        back = whitener.inverse_transform(whitener.transform(rows[:40].astype(np.float64)))
        directions = np.linalg.eigh(rf.Moments(DIM, covariance=True).update(rows).covariance)[1][:, -12:]
        wanted = whitener.mean + (unit - whitener.mean) @ directions @ directions.T
        np.testing.assert_allclose(back, wanted, rtol=0, atol=1e-9)


def test_files_batches_and_moments_give_the_same(rows, tmp_path):
    np.save(tmp_path / "a_1.npy", rows[:1200])
    np.save(tmp_path / "a_2.npy", rows[1200:])
    wanted = rf.Whitener.fit(rows, "pca", 0.1).matrix
    moments = rf.Moments(DIM, covariance=True).update(rows[:300]).update(rows[300:])
    for found in (
        rf.Whitener.fit(tmp_path, "pca", 0.1),
        rf.Whitener.fit([rows[:5], rows[5:]], "pca", 0.1),
        rf.Whitener.from_moments(moments, "pca", 0.1),
    ):
        np.testing.assert_allclose(found.matrix, wanted, rtol=0, atol=1e-3)


def test_bad_rows(rows):
    values = rows.copy()
    values[7] = 0
    with pytest.raises(ValueError, match="row 7 "):
        rf.Whitener.fit(values)
    whitener = rf.Whitener.fit(values, on_bad_rows="skip")
    assert whitener.count == 1999
    with pytest.raises(ValueError, match="row 7 "):
        whitener.transform(values)
    assert not whitener.transform(values, on_bad_rows="zero")[7].any()


def test_save_and_load(rows, tmp_path):
    path = tmp_path / "w.safetensors"
    whitener = rf.Whitener.fit(rows, "pca", "oas", 7)
    whitener.save(path)
    loaded = rf.Whitener.load(path)
    assert repr(loaded) == repr(whitener)
    assert loaded.shrinkage == whitener.shrinkage
    np.testing.assert_array_equal(loaded.transform(rows), whitener.transform(rows))
    np.testing.assert_array_equal(loaded.inverse_matrix, whitener.inverse_matrix)
    tensors, fields = _files.load(path, "whitener", {})
    for name in ("format", "kind", "package"):
        del fields[name]
    for tensors_, fields_, message in [
        (tensors | {"mean": tensors["mean"][:3]}, fields, "do not fit together"),
        (tensors | {"matrix": tensors["matrix"].T.copy()}, fields, "do not fit together"),
        (tensors, fields | {"whitening": "x"}, "header is damaged"),
        (tensors, fields | {"count": "x"}, "header is damaged"),
    ]:
        _files.save(path, "whitener", tensors_, fields_, version=2)
        with pytest.raises(ValueError, match=message):
            rf.Whitener.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "x"}, "kind must be one of zca, pca, cholesky, got 'x'"),
        ({"shrinkage": 2}, r"shrinkage must lie in \[0, 1\], got 2"),
        ({"shrinkage": "x"}, "shrinkage must be None, a number"),
        ({"n_components": 0}, "n_components must be a whole number of at least 1, got 0"),
        ({"n_components": DIM + 1}, "n_components must be at most the dimension 40, got 41"),
        ({"n_components": 3, "kind": "cholesky"}, "which kind 'cholesky' does not have"),
    ],
)
def test_options_that_are_none_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        rf.Whitener.fit(rows, **options)


def test_sets_that_cannot_be_whitened_are_refused(rows):
    few = rows[:25]
    with pytest.raises(ValueError, match=r"the covariance of x has rank 24 of 40, and 40 is needed: .*shrinkage="):
        rf.Whitener.fit(few)
    with pytest.raises(ValueError, match="rank 24 of 40, and 25 is needed"):
        rf.Whitener.fit(few, "pca", n_components=25)
    assert rf.Whitener.fit(few, "pca", n_components=24).matrix.shape == (24, DIM)
    assert rf.Whitener.fit(few, shrinkage=0.1).matrix.shape == (DIM, DIM)
    flat = rows.copy()
    flat[:, 3] = flat[:, 4]
    with pytest.raises(ValueError, match="rank 39 of 40"):
        rf.Whitener.fit(flat)
    with pytest.raises(ValueError, match="all rows are equal"):
        rf.Whitener.fit(np.repeat(rows[:1], 50, axis=0), shrinkage=0.5)
    with pytest.raises(ValueError, match="realign stats --covariance"):
        rf.Whitener.from_moments(rf.Moments(DIM).update(rows))
    with pytest.raises(ValueError, match="no rows"):
        rf.Whitener.from_moments(rf.Moments(DIM, covariance=True))
