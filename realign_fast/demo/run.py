"""The whole job on embeddings it makes itself: train, embed, fit, apply, check, measure."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._progress import progress, say
from ..alignment import Alignment, apply_files, fit
from ..geometry.metrics import centroid_gap, cosine_to_pair, knn_mixing, recall_at
from ..io.writer import verify

_SHARD_ROWS = 10_000
_HELD_OUT_PAIRS = 1_000


def run(
    out_dir: str | Path, *, overwrite: bool = False, num_rows: int = 50_000, steps: int = 400, seed: int = 0
) -> dict[str, Any]:
    """Run the demo, print what happens on stderr, and return the figures.

    Parameters
    ----------
    out_dir
        Receives `text/`, `image/` (shards), `alignment.safetensors`, `aligned/`, and pairs that nothing was fitted on:
        `held_out_text.npy`, `held_out_image.npy`.
    overwrite
        Replace what an earlier demo wrote there.
    num_rows
        Unpaired captions, and as many pictures of other scenes.
    steps
        Of the encoder's training.
    seed
        Of everything.

    Raises
    ------
    FileExistsError
        If `out_dir` is not empty and `overwrite` is not set.
    ImportError
        If torch is not installed.
    """
    folder = Path(out_dir)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty: pass --overwrite or another folder")
    try:
        from . import encoder as encoders
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError("the demo trains an encoder with torch: pip install 'realign-fast[torch]'") from None
    from .world import captions, render, sample_scenes

    began = time.monotonic()
    for name in ("text", "image"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for former in (folder / name).glob("shard_*.npy"):
            former.unlink()
    say(f"1. Train a small dual encoder on pictures and captions of coloured shapes ({steps} steps)")
    with progress("train", steps, enabled=True, unit="steps") as advance:
        encoder = encoders.train(steps=steps, seed=seed, progress=advance)

    say(f"2. Embed {num_rows:,} captions, {num_rows:,} pictures of other scenes and {_HELD_OUT_PAIRS:,} held-out pairs")
    texts = captions(sample_scenes(num_rows, seed + 1), seed + 1)
    _write_shards(folder / "text", encoders.embed_texts(encoder, texts))
    _write_shards(folder / "image", encoders.embed_images(encoder, render(sample_scenes(num_rows, seed + 2), seed + 2)))
    scenes = sample_scenes(_HELD_OUT_PAIRS, seed + 3)
    text = encoders.embed_texts(encoder, captions(scenes, seed + 3))
    image = encoders.embed_images(encoder, render(scenes, seed + 3))
    np.save(folder / "held_out_text.npy", text)
    np.save(folder / "held_out_image.npy", image)

    path = folder / "alignment.safetensors"
    say(f"3. realign fit {folder / 'text'} {folder / 'image'} -o {path}")
    fit(folder / "text", folder / "image").save(path)
    say(f"4. realign apply {path} {folder / 'text'} -o {folder / 'aligned'}")
    alignment = Alignment.load(path)
    applied = apply_files(alignment, folder / "text", folder / "aligned", overwrite=overwrite)
    say(f"5. realign verify {folder / 'aligned'}")
    verified = verify(folder / "aligned")
    if not verified["ok"]:
        raise OSError(f"{folder / 'aligned'}: {verified['problems'][0]}")
    drift = alignment.check(text)
    say(
        f"6. alignment.check(new captions): their mean lies {drift.distance:.4f} from that of the fit, "
        f"sampling noise is {drift.noise_floor:.4f}: {'they have drifted' if drift.drifted else 'no drift'}"
    )

    before, after = _measure(text, image), _measure(alignment.transform(text), image)
    say(f"\n{_HELD_OUT_PAIRS:,} held-out pairs            before    after")
    for name, label in _LABELS.items():
        say(f"{label:30} {before[name]:8.4f} {after[name]:8.4f}")
    say("Retrieval falls by design: a constant is added to every query. Aligned text is to stand in for images.")
    return {
        "rows": applied["rows"],
        "dim": alignment.dim,
        "before": before,
        "after": after,
        "drifted": drift.drifted,
        "seconds": round(time.monotonic() - began, 1),
    }


_LABELS = {
    "gap": "modality gap (centroids)",
    "mixing": "mixing of neighbours (k = 20)",
    "cosine": "cosine to the paired image",
    "recall_at_1": "text-to-image retrieval, top 1",
    "recall_at_5": "text-to-image retrieval, top 5",
}


def _measure(text: NDArray[np.float32], image: NDArray[np.float32]) -> dict[str, float]:
    return {
        "gap": centroid_gap(text, image),
        "mixing": knn_mixing(text, image),
        "cosine": cosine_to_pair(text, image),
        "recall_at_1": recall_at(text, image, k=1),
        "recall_at_5": recall_at(text, image, k=5),
    }


def _write_shards(folder: Path, rows: NDArray[np.float32]) -> None:
    for index, start in enumerate(range(0, len(rows), _SHARD_ROWS)):
        np.save(folder / f"shard_{index}.npy", rows[start : start + _SHARD_ROWS])
