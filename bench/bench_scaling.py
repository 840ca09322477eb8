"""How the kernels grow with rows and with threads: for the plots."""

from __future__ import annotations

import numpy as np
import pytest

from realign_fast import _C, Moments
from realign_fast._dtypes import empty
from realign_fast.backends import count_threads
from realign_fast.benchmark import rows_of

CHECKED_BY = ("test_kernels.py",)
DIM = 768
COUNTS = [100, 1_000, 10_000, 100_000, 1_000_000]


def cases(rows: np.ndarray, threads: int) -> dict[str, tuple]:
    """Return by kernel: what to call, its bytes or operations, the unit and the limit."""
    out, sums = empty(rows.shape, rows.dtype), np.zeros(DIM, np.int64)
    out.fill(0)
    rng = np.random.default_rng(0)
    row_map = _C.RowMap(1.1, *(factor * rng.normal(size=DIM) / 28 for factor in (0.5, 0.1)))
    covariance = Moments(DIM, covariance=True)
    return {
        "moments": (lambda: _C.moments(rows, False, sums, None, threads), rows.nbytes, "GB/s", "read"),
        "row transform": (
            lambda: _C.row_transform(rows, False, out, False, row_map, threads),
            2 * rows.nbytes,
            "GB/s",
            "copy",
        ),
        "covariance": (
            lambda: covariance.update(rows, num_threads=threads),
            len(rows) * DIM * (DIM + 1),
            "GFlop/s",
            "sgemm",
        ),
    }


def scaled(measure, pick, kernel: str, count: int, threads: int) -> None:
    run, work, unit, limit = cases(rows_of(count, DIM, "float32"), threads)[kernel]
    measure(
        kernel,
        run,
        unit=unit,
        work=work,
        limit=limit,
        dtype="float32",
        shape=(count, DIM),
        threads=threads,
        note=f"{threads} thread{'s' if threads > 1 else ''}",
        rounds=5,
        calls=max(1, 20_000 // count),
    )


@pytest.mark.parametrize("count", [*COUNTS[:-1], pytest.param(COUNTS[-1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", ["moments", "row transform", "covariance"])
def test_rows(measure, pick, kernel, count):
    scaled(measure, pick, kernel, min(count, pick(1_000, 100_000, 1_000_000)), count_threads(None))


@pytest.mark.parametrize("threads", range(1, count_threads(None) + 1))
@pytest.mark.parametrize("kernel", ["moments", "row transform", "covariance"])
def test_threads(measure, pick, kernel, threads):
    scaled(measure, pick, kernel, pick(1_000, 100_000, 200_000), threads)
