"""The mixing of two sets against the search of FAISS alone on the same rows, in turn, in one process."""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _tables import arguments, report, row

from realign_fast.benchmark import interleave, machine, summarise
from realign_fast.geometry.neighbors import mixing, unit_rows

DIM = 768
K = 20


def cloud(count: int, seed: int) -> np.ndarray:
    """Rows about a mean of their own, with a spectrum that falls as that of real embeddings."""
    rng = np.random.default_rng(seed)
    colours = np.arange(1, DIM + 1, dtype=np.float32) ** -0.65
    rows = rng.standard_normal((count, DIM), np.float32) * colours
    rows += rng.standard_normal(DIM, np.float32) * colours
    return rows


def mixing_against_search(count: int, rounds: int) -> list[dict]:
    text, image = cloud(count, 0), cloud(count, 1)
    unit = unit_rows(np.concatenate([text, image]), "rows")
    cases = {
        "mixing": lambda: mixing(text, image, K, backend="faiss"),
        "faiss.knn": lambda: faiss.knn(unit, unit, K + 1, metric=faiss.METRIC_INNER_PRODUCT),
    }
    found = {name: summarise(times) for name, times in interleave(cases, rounds).items()}
    mine = found["mixing"]
    return [
        row(
            f"mixing, {count:,} + {count:,} x {DIM}, k {K}",
            mine["median_s"],
            "faiss.knn of unit rows alone",
            found["faiss.knn"]["median_s"] / mine["median_s"],
            "0.95x",
            mine["spread"],
            "s",
        )
    ]


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    count, rounds = (2_000, 3) if options.quick else (50_000, 3)
    report(
        mixing_against_search(count, rounds), options.json, machine(("faiss-cpu",)), num_rows=2 * count, rounds=rounds
    )
