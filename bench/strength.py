"""What `ot` chooses on real pairs that it never sees as pairs, what that gives on held-out ones, and the trade-off.

Reads the embeddings in a folder of sets, each with `text.npy` and `image.npy`, row i of one being the pair of row i of
the other. Writes a plot beside the JSON file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _tables import arguments, row, write_json

from realign_fast import fit
from realign_fast.benchmark import machine
from realign_fast.geometry.metrics import cosine_to_pair, knn_mixing, knn_overlap, recall_at

PAIRED = "mindgap_clip_coco500"
SETS = (PAIRED, "mindgap_convirt500", "mindgap_videoclip", "mindgap_clasp")
MAPS = {"auto": {"method": "ot"}, "realign": {"method": "realign"}, "plain": {"method": "ot", "strength": 0.5}}
GOALS = {
    "cosine to the paired image": "0.025 above",
    "recall@1, text to image": "0.015 above",
    "mixing, k = 20": "1.6x",
    "neighbours kept, k = 10": "0.75 in all",
}


def load(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.load(folder / name / f"{side}.npy").astype(np.float32) for side in ("text", "image"))


def measured(text: np.ndarray, out: np.ndarray, image: np.ndarray) -> tuple[float, ...]:
    return cosine_to_pair(out, image), recall_at(out, image), knn_mixing(out, image), knn_overlap(text, out)


def halves(folder: Path, num_halves: int) -> list[dict]:
    text, image = load(folder, PAIRED)
    found: dict[str, list] = {name: [] for name in MAPS}
    for seed in range(num_halves):
        rng = np.random.default_rng(seed)
        fitted, held_out = np.split(rng.permutation(len(text)), 2)
        shuffled = rng.permutation(fitted)  # so that no row of one side tells of the other
        for name, options in MAPS.items():
            alignment = fit(text[fitted], image[shuffled], **options)
            found[name].append(measured(text[held_out], alignment.transform(text[held_out]), image[held_out]))
    means = {name: np.mean(each, axis=0) for name, each in found.items()}
    spread = np.std(found["auto"], axis=0) / np.sqrt(num_halves) / means["auto"]
    return [
        row(
            metric,
            means["auto"][i],
            f"{peer}: {means[name][i]:.3f}",
            means["auto"][i] / means[name][i],
            goal,
            spread[i],
            "",
        )
        for i, (metric, goal) in enumerate(GOALS.items())
        for name, peer, goal in (("realign", "ReAlign", goal), ("plain", "shrinkage 0.5, strength 0.5", "none"))
    ]


def choices(folder: Path) -> dict[str, dict]:
    """Return what is chosen on the whole of each set."""
    return {name: fit(*load(folder, name), method="ot").report["selection"] for name in SETS}


def plot(selections: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(selections), figsize=(4 * len(selections), 3.6), layout="constrained")
    for axis, (name, selection) in zip(axes, selections.items(), strict=True):
        candidates = selection["candidates"]
        shrinkages = sorted({each["shrinkage"] for each in candidates})
        for number, shrinkage in enumerate(shrinkages):
            line = [each for each in candidates if each["shrinkage"] == shrinkage]
            colour = pyplot.colormaps["viridis"](number / len(shrinkages))
            axis.plot(
                [each["overlap"] for each in line],
                [each["distance"] for each in line],
                ".-",
                color=colour,
                label=f"shrinkage {shrinkage:g}",
            )
        for each in candidates:
            if (each["shrinkage"], each["strength"]) == (selection["shrinkage"], selection["strength"]):
                axis.plot(each["overlap"], each["distance"], "o", ms=12, mfc="none", mec="crimson", mew=2)
        axis.axvline(0.8, color="grey", lw=0.8, ls=":")
        known = selection["reliability"]
        axis.set_title(
            f"{name}\nstrength {selection['strength']:g}, shrinkage {selection['shrinkage']:g}, "
            + ("equal covariances" if known is None else f"map known to {known:.0%}"),
            fontsize=9,
        )
        axis.set_xlabel("share of nearest neighbours kept")
    axes[0].set_ylabel("energy distance, held out")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    options = parser.parse_args()
    if not (options.data / PAIRED).is_dir():
        sys.exit(f"there are no embeddings at {options.data}: pass --data")
    lines = halves(options.data, 2 if options.quick else 20)
    for line in lines:
        print(f"{line['what']:30} {line['ours']:.3f}   {line['peer']:40} goal {line['goal']}")
    selections = choices(options.data)
    for name, selection in selections.items():
        kept = {key: value for key, value in selection.items() if key != "candidates"}
        print(name, ", ".join(f"{key} {value:.3g}" for key, value in kept.items() if value is not None))
    if options.json is not None:
        settings = {"halves": 2 if options.quick else 20, "selections": selections}
        write_json(options.json, machine=machine(()), settings=settings, rows=lines)
        plot(selections, options.json.with_suffix(".png"))
