"""Covariance and whitening against the libraries that users would take instead, in turn, in one process.

Ours normalises the rows to unit length as it goes, the others take unit rows. The peers are those of the extra `peers`;
one that is not installed is left out, and said to be.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _tables import arguments, report, row

from realign_fast import _C, Moments, Whitener
from realign_fast._dtypes import empty
from realign_fast.benchmark import interleave, machine, rows_of, summarise

DIM = 768
PEERS = ("scipy", "scikit-learn", "scikit-learn-intelex", "torchmetrics", "concept-erasure", "faiss-cpu")
FAST = ', precision="fast"'
SSYRK = "scipy ssyrk alone"
GOALS = {SSYRK: "1x", "scikit-learn-intelex": "1.3x", "numpy.cov": "5x"}
FAST_GOALS = {SSYRK: "1.8x"}  # of precision="fast", which is measured against nothing else


class AsTheyAre(torch.nn.Module):
    """Features that have been computed already, for torchmetrics."""

    num_features = DIM

    def forward(self, x):
        """Return what comes."""
        return x


def peers_of(unit: np.ndarray) -> dict[str, Callable[[], object]]:
    """Return one call of each library's covariance of these unit rows."""
    tensor = torch.from_numpy(unit)
    cases: dict[str, Callable[[], object]] = {}

    def offer(name: str, make: Callable[[], Callable[[], object]]) -> None:
        try:
            cases[name] = make()
        except ImportError as error:
            print(f"left out: {name} ({error})", file=sys.stderr)

    def scipy_ssyrk():
        from scipy.linalg.blas import ssyrk

        return lambda: ssyrk(1.0, unit.T, lower=0)

    def intelex():
        from sklearnex.covariance import IncrementalEmpiricalCovariance

        return lambda: IncrementalEmpiricalCovariance(batch_size=8192).fit(unit).covariance_

    def scikit_learn():
        from sklearn.covariance import EmpiricalCovariance

        return lambda: EmpiricalCovariance(store_precision=False).fit(unit).covariance_

    def torchmetrics():
        from torchmetrics.image.fid import FrechetInceptionDistance

        def run():
            metric = FrechetInceptionDistance(feature=AsTheyAre(), normalize=True)
            for part in tensor.split(8192):
                metric.update(part, real=True)

        return run

    def concept_erasure():
        from concept_erasure import LeaceFitter

        concepts = torch.zeros(len(unit), 1)

        def run():
            fitter = LeaceFitter(DIM, 1)
            for part, concept in zip(tensor.split(8192), concepts.split(8192), strict=True):
                fitter.update(part, concept)

        return run

    def faiss():
        from faiss import PCAMatrix

        return lambda: PCAMatrix(DIM, DIM).train(unit)

    offer(SSYRK, scipy_ssyrk)
    cases["numpy.cov"] = lambda: np.cov(unit, rowvar=False)
    cases["torch.cov"] = lambda: torch.cov(tensor.T)
    offer("scikit-learn", scikit_learn)
    offer("scikit-learn-intelex", intelex)
    offer("torchmetrics FID update", torchmetrics)
    offer("concept-erasure LeaceFitter", concept_erasure)
    offer("faiss PCAMatrix (with its eigenvectors)", faiss)
    return cases


def unit_rows(count: int) -> np.ndarray:
    unit = rows_of(count, DIM, "float32")
    for part in np.array_split(unit, max(1, count // 10_000)):
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return unit


def covariances(count: int, rounds: int, only: tuple[str, ...] = ()) -> list[dict]:
    unit = unit_rows(count)
    cases = {name: run for name, run in peers_of(unit).items() if not only or name in only}
    ours: dict[str, Callable[[], object]] = {"": lambda: Moments(DIM, covariance=True).update(unit)}
    if _C.has_fast_products():
        ours[FAST] = lambda: Moments(DIM, covariance=True, precision="fast").update(unit)
    else:
        print('left out: precision="fast" (the processor has no dot products of bfloat16)', file=sys.stderr)
    found = {name: summarise(times) for name, times in interleave(ours | cases, rounds).items()}
    return [
        row(
            f"covariance float32{which}, {count:,} x {DIM}",
            count * DIM * (DIM + 1) / found[which]["median_s"] / 1e9,
            name,
            found[name]["median_s"] / found[which]["median_s"],
            goals.get(name, "none"),
            found[which]["spread"],
            "GFlop/s",
        )
        for which, goals, peers in (("", GOALS, cases), (FAST, FAST_GOALS, FAST_GOALS))
        for name in peers
        if which in found and name in found
    ]


def whitening(count: int, rounds: int) -> list[dict]:
    unit = unit_rows(count)
    whitener = Whitener.fit(unit[:20_000], shrinkage=0.1)
    matrix = np.ascontiguousarray(whitener.matrix.T, np.float32)
    out = empty(unit.shape, unit.dtype)
    out.fill(0)
    cases = {
        "whitening": lambda: whitener.transform(unit, out=out),
        "numpy sgemm alone": lambda: np.matmul(unit, matrix, out=out),
    }
    found = {name: summarise(times) for name, times in interleave(cases, rounds).items()}
    mine = found["whitening"]
    return [
        row(
            f"whitening float32, {count:,} x {DIM}",
            2 * count * DIM * DIM / mine["median_s"] / 1e9,
            "numpy sgemm alone",
            found["numpy sgemm alone"]["median_s"] / mine["median_s"],
            "0.9x",
            mine["spread"],
            "GFlop/s",
        )
    ]


def errors(count: int) -> list[dict]:
    """Compare with float64 on rows whose mean has norm 0.9, chunk by chunk."""
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
    found = moments.covariance
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    norm = float(np.linalg.norm(moments.mean))
    return [
        row(
            f"covariance: relative error (Frobenius), {moments.count:,} x {DIM}, mean of norm {norm:.2f}",
            error,
            "a limit of 1e-7",
            1e-7 / error,
            "1x",
            0.0,
            "",
        )
    ]


def fast_errors(count: int) -> list[dict]:
    """Compare fast products with exact ones, and with the error that they say to have measured themselves."""
    if not _C.has_fast_products():
        return []
    rng, lines = np.random.default_rng(0), []
    for name, spectrum in (("spectrum k^-1.3", np.arange(1.0, DIM + 1) ** -1.3), ("isotropic", np.ones(DIM))):
        rows = rng.standard_normal((count, DIM), np.float32)
        rows *= np.sqrt(spectrum / spectrum.sum()).astype(np.float32)
        exact = Moments(DIM, covariance=True).update(rows).covariance
        moments = Moments(DIM, covariance=True, precision="fast").update(rows)
        fast, said = moments.covariance, moments.precision_error
        error = float(np.linalg.norm(fast - exact) / np.linalg.norm(exact))
        smallest = abs(float(np.linalg.eigvalsh(fast)[0] / np.linalg.eigvalsh(exact)[0] - 1))
        what = f"covariance{FAST}, {count:,} x {DIM}, {name}: relative error"
        if name != "isotropic":
            lines.append(row(f"{what} (Frobenius)", error, "a limit of 1e-4", 1e-4 / error, "1x", 0.0, ""))
        lines.append(row(f"{what} (Frobenius)", error, "its own precision_error", said / error, "none", 0.0, ""))
        lines.append(
            row(
                f"{what} of the smallest eigenvalue",
                smallest,
                "its own precision_error",
                said / smallest,
                "none",
                0.0,
                "",
            )
        )
    return lines


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of the peers
    options = arguments(__doc__).parse_args()
    small, big, rounds = (5_000, 10_000, 2) if options.quick else (200_000, 1_000_000, 3)
    lines = covariances(small, rounds)
    print("one of four parts done", file=sys.stderr)
    lines += covariances(big, rounds, only=(SSYRK, "scikit-learn-intelex"))
    print("two of four parts done", file=sys.stderr)
    lines += whitening(big, rounds)
    print("three of four parts done", file=sys.stderr)
    lines += errors(2 * big) + fast_errors(small)
    report(lines, options.json, machine(PEERS), small=small, big=big, rounds=rounds)
