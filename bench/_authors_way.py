"""The published procedure on the published file format: what the commands are compared with.

Written from the paper's formulas: float64, chunks of 10,000 rows, a pass for each statistic, pickles of dicts.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np

CHUNK = 10_000


def chunks(folder: Path):
    for path in sorted(folder.glob("*.pkl")):
        with path.open("rb") as file:
            entries = pickle.load(file)
        for start in range(0, len(entries), CHUNK):
            part = entries[start : start + CHUNK]
            rows = np.array([entry["embed"] for entry in part], np.float64)
            yield path.name, part, project(rows)


def mean_of(values) -> np.ndarray | float:
    total, count = 0.0, 0
    for rows in values:
        total = total + rows.sum(axis=0)
        count += len(rows)
    return total / count


def project(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def main(text: Path, image: Path, out: Path) -> None:
    mean_text = mean_of(rows for _, _, rows in chunks(text))
    mean_image = mean_of(rows for _, _, rows in chunks(image))
    trace_text = mean_of(((rows - mean_text) ** 2).sum(axis=1) for _, _, rows in chunks(text))
    trace_image = mean_of(((rows - mean_image) ** 2).sum(axis=1) for _, _, rows in chunks(image))
    scale = np.sqrt(trace_image / (trace_text + 1e-10))

    def projected(rows: np.ndarray) -> np.ndarray:
        return project(mean_image + scale * (rows - mean_text))

    drift = mean_of(projected(rows) for _, _, rows in chunks(text)) - mean_image
    out.mkdir()
    written: dict[str, list] = {}
    for name, part, rows in chunks(text):
        mapped = project(projected(rows) - drift).astype(np.float32)
        written.setdefault(name, []).extend(
            {"id": entry["id"], "embed": row} for entry, row in zip(part, mapped, strict=True)
        )
        if len(written) > 1:
            dump(out, written, next(iter(written)))
    for name in list(written):
        dump(out, written, name)


def dump(out: Path, written: dict[str, list], name: str) -> None:
    with (out / name).open("wb") as file:
        pickle.dump(written.pop(name), file, protocol=4)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
