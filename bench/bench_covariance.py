"""Covariance, whitening and maps with a matrix, against the libraries that users would take instead.

Ours brings the rows to unit length as it goes, the others take unit rows. The peers are those of the extra `peers`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from realign_fast import _C, Moments, Whitener, fit_from_moments
from realign_fast._dtypes import empty
from realign_fast.benchmark import rows_of

CHECKED_BY = ("test_covariance.py", "test_whitening.py", "test_methods.py::test_transport_agrees_with_pot")
DIM = 768
SSYRK, INTELEX = "scipy ssyrk alone", "scikit-learn-intelex"
needs_fast = pytest.mark.skipif(not _C.has_fast_products(), reason="the processor has no dot products of bfloat16")


class AsTheyAre(torch.nn.Module):
    """Features that have been computed already, for torchmetrics."""

    num_features = DIM

    def forward(self, x):
        """Return what comes."""
        return x


def unit_rows(count: int) -> np.ndarray:
    unit = rows_of(count, DIM, "float32")
    for part in np.array_split(unit, max(1, count // 10_000)):
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return unit


def ssyrk(unit: np.ndarray) -> Callable[[], object]:
    from scipy.linalg.blas import ssyrk

    return lambda: ssyrk(1.0, unit.T, lower=0)


def intelex(unit: np.ndarray) -> Callable[[], object]:
    from sklearnex.covariance import IncrementalEmpiricalCovariance

    return lambda: IncrementalEmpiricalCovariance(batch_size=8192).fit(unit).covariance_


def scikit_learn(unit: np.ndarray) -> Callable[[], object]:
    from sklearn.covariance import EmpiricalCovariance

    return lambda: EmpiricalCovariance(store_precision=False).fit(unit).covariance_


def torchmetrics(unit: np.ndarray) -> Callable[[], object]:
    from torchmetrics.image.fid import FrechetInceptionDistance

    def run() -> None:
        metric = FrechetInceptionDistance(feature=AsTheyAre(), normalize=True)
        for part in torch.from_numpy(unit).split(8192):
            metric.update(part, real=True)

    return run


def concept_erasure(unit: np.ndarray) -> Callable[[], object]:
    from concept_erasure import LeaceFitter

    concepts = torch.zeros(len(unit), 1)

    def run() -> None:
        fitter = LeaceFitter(DIM, 1)
        for part, concept in zip(torch.from_numpy(unit).split(8192), concepts.split(8192), strict=True):
            fitter.update(part, concept)

    return run


def pca_matrix(unit: np.ndarray) -> Callable[[], object]:
    from faiss import PCAMatrix

    return lambda: PCAMatrix(DIM, DIM).train(unit)


PEERS = {
    SSYRK: ssyrk,
    "numpy.cov": lambda unit: lambda: np.cov(unit, rowvar=False),
    "torch.cov": lambda unit: lambda: torch.cov(torch.from_numpy(unit).T),
    "scikit-learn": scikit_learn,
    INTELEX: intelex,
    "torchmetrics FID update": torchmetrics,
    "concept-erasure LeaceFitter": concept_erasure,
    "faiss PCAMatrix (with its eigenvectors)": pca_matrix,
}
GOALS = {SSYRK: 1.0, INTELEX: 1.3, "numpy.cov": 5.0}


def measured(measure, unit: np.ndarray, precision: str, names, goals, rounds: int) -> None:
    measure(
        "covariance",
        lambda: Moments(DIM, covariance=True, precision=precision).update(unit),
        {name: PEERS[name](unit) for name in names},
        unit="GFlop/s",
        work=len(unit) * DIM * (DIM + 1),
        limit="sgemm",
        goals=goals,
        dtype="float32",
        shape=unit.shape,
        note='precision="fast"' if precision == "fast" else "",
        rounds=rounds,
    )


def test_covariance(measure, pick):
    measured(measure, unit_rows(pick(2_000, 50_000, 200_000)), "exact", PEERS, GOALS, 3)


@pytest.mark.slow
def test_covariance_of_many_rows(measure, pick):
    measured(measure, unit_rows(pick(2_000, 1_000_000, 1_000_000)), "exact", (SSYRK, INTELEX), GOALS, 3)


@needs_fast
def test_fast_covariance(measure, pick):
    measured(measure, unit_rows(pick(2_000, 100_000, 200_000)), "fast", (SSYRK,), {SSYRK: 1.8}, 5)


@needs_fast
@pytest.mark.slow
def test_fast_covariance_of_many_rows(measure, pick):
    measured(measure, unit_rows(pick(2_000, 1_000_000, 1_000_000)), "fast", (SSYRK,), {SSYRK: 1.8}, 5)


def test_whitening(measure, pick):
    from faiss import LinearTransform, copy_array_to_vector, swig_ptr

    unit = unit_rows(pick(2_000, 100_000, 1_000_000))
    whitener = Whitener.fit(unit[:20_000], shrinkage=0.1)
    matrix = np.ascontiguousarray(whitener.matrix.T, np.float32)
    out = empty(unit.shape, unit.dtype)
    out.fill(0)
    linear = LinearTransform(DIM, DIM, True)
    copy_array_to_vector(np.ascontiguousarray(matrix.T).ravel(), linear.A)
    copy_array_to_vector(-matrix.T @ whitener.mean.astype(np.float32), linear.b)
    linear.is_trained = True
    centre, tensor = torch.from_numpy(whitener.mean.astype(np.float32)), torch.from_numpy(unit)
    x, y = torch.from_numpy(matrix), torch.from_numpy(out)
    measure(
        "whitening",
        lambda: whitener.transform(unit, out=out),
        {
            "numpy sgemm alone": lambda: np.matmul(unit, matrix, out=out),
            "torch, of unit rows": lambda: torch.matmul(tensor - centre, x, out=y),
            "faiss LinearTransform, of unit rows": lambda: linear.apply_noalloc(
                len(unit), swig_ptr(unit), swig_ptr(out)
            ),
        },
        unit="GFlop/s",
        work=2 * len(unit) * DIM * DIM,
        limit="sgemm",
        goals={"numpy sgemm alone": 0.9},
        dtype="float32",
        shape=unit.shape,
        rounds=3,
    )


def test_optimal_transport(measure, pick):
    """The solver alone, from statistics to a map; POT has the same map in `ot.gaussian`."""
    import ot

    dim = pick(32, DIM, DIM)
    rng, spectrum = np.random.default_rng(0), np.arange(1, dim + 1) ** -0.6
    rows = [(rng.standard_normal((4 * dim, dim)) * spectrum + mean).astype(np.float32) for mean in (0.1, -0.1)]
    sides = [Moments(dim, covariance=True).update(each) for each in rows]
    means, covariances = [side.mean for side in sides], [side.covariance + 1e-6 * np.eye(dim) for side in sides]
    measure(
        "optimal transport, from statistics to the map",
        lambda: fit_from_moments(*sides, text=rows[0], method="ot", strength=1.0, shrinkage=1e-3),
        {"POT bures_wasserstein_mapping": lambda: ot.gaussian.bures_wasserstein_mapping(*means, *covariances)},
        unit="ms",
        dtype="float64",
        shape=(dim, dim),
        rounds=3,
    )


def test_error_of_the_covariance(measure, pick):
    """Against float64 on rows whose mean has norm 0.9, chunk by chunk."""
    count = pick(4_000, 100_000, 2_000_000)
    rng = np.random.default_rng(0)
    mean = rng.normal(size=DIM)
    mean *= 0.9 / np.linalg.norm(mean)
    colours = np.arange(1.0, DIM + 1) ** -0.65
    colours *= np.sqrt(0.19 / (colours**2).sum())
    moments = Moments(DIM, covariance=True, precision="exact")
    total, products, step = np.zeros(DIM), np.zeros((DIM, DIM)), min(count, 50_000)
    for _ in range(count // step):
        rows = (mean + colours * rng.standard_normal((step, DIM))).astype(np.float32)
        moments.update(rows)
        unit = rows.astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        unit -= mean  # so that float64 keeps its digits
        total += unit.sum(axis=0)
        products += unit.T @ unit
    wanted = products / moments.count - np.outer(total, total) / moments.count**2
    error = float(np.linalg.norm(moments.covariance - wanted) / np.linalg.norm(wanted))
    norm = float(np.linalg.norm(moments.mean))
    what = f"covariance: relative error (Frobenius), {moments.count:,} x {DIM}, mean of norm {norm:.2f}"
    measure.figure(what, error, "", "a limit of 1e-7", error / 1e-7, goal=1.0, at_most=True)


@needs_fast
@pytest.mark.parametrize("name", ["spectrum k^-1.3", "isotropic"])
def test_error_of_fast_products(measure, pick, name):
    """Against exact ones, and against the error that they say to have measured themselves."""
    count, rng = pick(5_000, 200_000, 200_000), np.random.default_rng(0)
    spectrum = np.ones(DIM) if name == "isotropic" else np.arange(1.0, DIM + 1) ** -1.3
    rows = rng.standard_normal((count, DIM), np.float32)
    rows *= np.sqrt(spectrum / spectrum.sum()).astype(np.float32)
    exact = Moments(DIM, covariance=True).update(rows).covariance
    moments = Moments(DIM, covariance=True, precision="fast").update(rows)
    fast, said = moments.covariance, moments.precision_error
    error = float(np.linalg.norm(fast - exact) / np.linalg.norm(exact))
    smallest = abs(float(np.linalg.eigvalsh(fast)[0] / np.linalg.eigvalsh(exact)[0] - 1))
    what = f'covariance, precision="fast", {count:,} x {DIM}, {name}: relative error'
    if name != "isotropic":
        measure.figure(f"{what} (Frobenius)", error, "", "a limit of 1e-4", error / 1e-4, goal=1.0, at_most=True)
    for which, value in (("(Frobenius)", error), ("of the smallest eigenvalue", smallest)):
        measure.figure(f"{what} {which}", value, "", "its own precision_error", value / said)
