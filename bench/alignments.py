"""What the maps do to real embeddings, in sample and held out, beside the figures that the papers print.

Reads the embeddings in a folder of sets, each with `text.npy` and `image.npy`, row i of one being the pair of row i of
the other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _tables import arguments, write_json

from realign_fast import Moments, fit
from realign_fast.benchmark import machine
from realign_fast.geometry.metrics import centroid_gap, cosine_to_pair, knn_mixing, knn_overlap, recall_at
from realign_fast.geometry.spectra import angular_js, eigenvalues, spectrum_exponent

SETS = {
    "mindgap_clip_coco500": "COCO, CLIP",
    "mindgap_convirt500": "ConVIRT",
    "mindgap_videoclip": "VideoCLIP",
    "mindgap_clasp": "CLASP",
}
MAPS = {
    "none": None,
    "anchor": {"method": "anchor"},
    "anchor_trace": {"method": "anchor_trace"},
    "realign": {"method": "realign"},
    "realign, refine=3": {"method": "realign", "refine": 3},
    "c3, sigma=0.016": {"method": "c3"},
    "coral, shrinkage=1e-4": {"method": "coral", "shrinkage": 1e-4},
    "ot, strength=0.5": {"method": "ot", "shrinkage": 0.5, "strength": 0.5},
}
COLUMNS = (
    "rows",
    "map",
    "centroid gap",
    "mixing, k 20",
    "overlap, k 10",
    "recall@1",
    "cosine to pair",
    "JS",
    "exponent",
)
# As printed: LLM2CLIP on 100,000 rows of Bunny captions (the gap) and of pairs; None where no figure is given.
PAPERS = (
    ("ReAlign paper", "none", None, 0.0032, None, None, None, None, 1.33),
    ("ReAlign paper", "c3", None, 0.0131, None, None, None, 0.19, 1.06),
    ("ReAlign paper", "realign", 2.64e-4, 0.0435, 0.873, None, None, 0.0066, 1.33),
    ("ReAlign paper", "bca", None, None, 0.101, None, None, None, None),
)


def load(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.load(folder / name / f"{side}.npy").astype(np.float64) for side in ("text", "image"))


def measured(text: np.ndarray, out: np.ndarray, image: np.ndarray) -> list[float]:
    values = eigenvalues(Moments(out.shape[1], covariance=True).update(out))
    return [
        centroid_gap(out, image),
        knn_mixing(out, image, k=min(20, len(text) - 1)),
        knn_overlap(text, out, k=10),
        recall_at(out, image),
        cosine_to_pair(out, image),
        angular_js(out, image),
        spectrum_exponent(values).exponent,
    ]


def mapped(options: dict | None, fitted: tuple[np.ndarray, ...], text: np.ndarray, seed: int) -> np.ndarray:
    if options is None:
        return text
    return fit(*fitted, **options).transform(text, seed=seed, index=np.arange(len(text)))


def cell(values: np.ndarray) -> str:
    mean = values.mean()
    text = f"{mean:.2e}" if 0 < abs(mean) < 0.01 else f"{mean:.3f}"
    return text if len(values) < 2 or np.ptp(values) < 1e-12 else f"{text} ± {values.std(ddof=1):.2g}"


def table(folder: Path, num_seeds: int) -> list[list[str]]:
    lines = []
    for name, label in SETS.items():
        text, image = load(folder, name)
        for title, options in MAPS.items():
            seeds = range(num_seeds if title.startswith("c3") else 1)
            try:
                found = np.array([measured(text, mapped(options, (text, image), text, seed), image) for seed in seeds])
            except ValueError as error:
                if "rank" not in str(error):
                    raise
                lines.append([label, title, "needs a larger shrinkage: fewer rows than dimensions", *[""] * 6])
                continue
            lines.append([label, title, *map(cell, found.T)])
    text, image = load(folder, next(iter(SETS)))
    for title, options in MAPS.items():
        found = []
        for seed in range(num_seeds):
            fitted, held = np.split(np.random.default_rng(seed).permutation(len(text)), 2)
            out = mapped(options, (text[fitted], image[fitted]), text[held], seed)
            found.append(measured(text[held], out, image[held]))
        lines.append([f"COCO, held out ({num_seeds} halves)", title, *map(cell, np.array(found).T)])
    printed = [[paper, title, *("" if x is None else f"{x:.3g}" for x in figures)] for paper, title, *figures in PAPERS]
    return lines + printed


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    options = parser.parse_args()
    if not (options.data / next(iter(SETS))).is_dir():
        sys.exit(f"there are no embeddings at {options.data}: pass --data")
    found = table(options.data, 2 if options.quick else 12)
    for line in [list(COLUMNS), *found]:
        print(" | ".join(line))
    if options.json is not None:
        write_json(options.json, machine=machine(("faiss-cpu",)), columns=COLUMNS, table=found)
