"""Makes the files of this version that every later one must read: `python tests/files/make.py`.

They go into a folder named after the version, such as `0.1`, and beside them `values.json`: what they have to say,
computed by plain NumPy from the rows where that can be. Run it once for a version, before it is released, and commit
the folder: from then on it stays as it is. Rows come from a seed and files have fixed times of change, so that a second
run gives the same bytes; other processors and other versions of the packages may differ in last digits.
"""

import json
import os
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import realign_fast as rf
from realign_fast.alignment import apply_files
from realign_fast.encode import TextEncoder, embed_texts
from realign_fast.revision import ReVisionConfig, ReVisionForCausalLM

DIM, ROWS, PARTS = 8, 96, 2
SECONDS = 1_700_000_000  # when all files were changed last
METHODS = {
    "anchor_trace": {},
    "realign": {"refine": 1},
    "c3": {"sigma": 0.05},
    "center": {},
    "whiten": {"kind": "zca", "shrinkage": 0.1},
    "ot": {"strength": 0.5, "shrinkage": 0.1},
}


def main() -> None:
    folder = Path(__file__).resolve().parent / ".".join(rf.__version__.split(".")[:2])
    if folder.exists():
        sys.exit(f"{folder} exists: files of a version are made once; remove it if that is not released yet")
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        make(folder, Path(scratch))


def make(folder: Path, scratch: Path) -> None:
    rng = np.random.default_rng(0)
    text, image = (
        (rng.normal(0, rng.uniform(0.5, 2, DIM), (ROWS, DIM)) + rng.normal(0, 2, DIM)).astype(np.float32)
        for _ in range(2)
    )
    text[-1] = 0  # a bad row
    np.save(folder / "text.npy", text)
    np.save(folder / "image.npy", image)
    ids = [f"scene {number}, ü" for number in range(ROWS)]
    for side, rows in (("text", text), ("image", image)):
        (scratch / side).mkdir()
        for number, part in enumerate(np.array_split(np.arange(ROWS), PARTS)):
            lists = pa.FixedSizeListArray.from_arrays(pa.array(rows[part].ravel()), DIM)
            table = pa.table({"id": [ids[row] for row in part], "row": part, "embedding": lists})
            parquet.write_table(table, scratch / side / f"part_{number}.parquet")
        settle(scratch / side)
    values = {
        "alignments": make_alignments(folder / "alignments", scratch, text, image),
        "moments": make_moments(folder, text),
        "whitener": make_whitener(folder, image),
        "ids": make_applied(folder, scratch, ids),
        "embedded": make_embedded(folder, scratch),
        "projector": make_projector(folder / "model", image),
    }
    (folder / "values.json").write_text(json.dumps(values) + "\n")


def settle(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (SECONDS, SECONDS))


def unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return rows / np.where(norms == 0, 1, norms)


def make_alignments(folder: Path, scratch: Path, text: np.ndarray, image: np.ndarray) -> dict[str, object]:
    folder.mkdir()
    found = {}
    for method, options in METHODS.items():
        sides = scratch / "text", scratch / "image"
        fitted = rf.fit(*sides, method=method, on_bad_rows="skip", encoder="clip@0123", **options)
        fitted.save(folder / f"{method}.safetensors")
        found[method] = {
            "source": fitted.transform(text[:4].astype(np.float64), noise_std=0).tolist(),
            "target": fitted.transform(image[:4].astype(np.float64), side="target").tolist(),
        }
    return found


def make_moments(folder: Path, text: np.ndarray) -> dict[str, object]:
    found = {}
    for name, rows, policy in (("zero", text, "zero"), ("skip", text[:-1], "skip")):
        moments = rf.Moments(DIM, covariance=policy == "skip").update(text, on_bad_rows=policy)
        moments.save(folder / f"moments_{name}.safetensors")
        centred = unit(rows) - unit(rows).mean(axis=0)
        found[name] = {
            "count": len(rows),
            "num_zero": int(policy == "zero"),
            "num_skipped": int(policy == "skip"),
            "mean": unit(rows).mean(axis=0).tolist(),
            "covariance": (centred.T @ centred / len(rows)).tolist(),
        }
    window = rf.MomentsWindow(DIM, size=4, covariance=True)
    for name, part in zip(("2026-02-01", "2026-02-02", None), np.array_split(text[:-1], 3), strict=True):
        window.push(rf.Moments(DIM, covariance=True).update(part), name)
    window.save(folder / "window.safetensors")
    return found


def make_whitener(folder: Path, image: np.ndarray) -> list[list[float]]:
    whitener = rf.Whitener.fit(image, "pca", shrinkage=0.1, n_components=5)
    whitener.save(folder / "whitener.safetensors")
    rows: np.ndarray = whitener.transform(image[:4].astype(np.float64))
    return rows.tolist()


def make_applied(folder: Path, scratch: Path, ids: list[str]) -> dict[str, int]:
    alignment = rf.Alignment.load(folder / "alignments" / "realign.safetensors")
    apply_files(alignment, scratch / "text", folder / "aligned", format="npy", on_bad_rows="zero")
    settle(folder / "aligned")
    for column in ("id", "row"):
        rf.data.EmbeddingDataset(folder / "aligned", index=folder / f"{column}.index", id_column=column)
    return {ids[row]: row for row in (0, 1, 47, 48, ROWS - 1)}


def make_embedded(folder: Path, scratch: Path) -> list[list[str]]:
    """Embed five texts by an encoder with random weights; return the ids of each shard."""
    words = {word: number for number, word in enumerate(["[pad]", "[end]", "[unk]", "red", "green", "box", "ball"])}
    tokenizer = Tokenizer(models.WordLevel(words, "[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[pad]", eos_token="[end]", unk_token="[unk]"
    ).save_pretrained(scratch / "clip")
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = tower | {"vocab_size": len(words), "max_position_embeddings": 8, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 8, "patch_size": 8}, projection_dim=DIM)
    CLIPModel(config).save_pretrained(scratch / "clip")
    captions = [("a", "red box"), ("b", "green ball"), ("c", ""), ("d", "box"), ("e", "ball")]
    records = [json.dumps({"id": name, "caption": caption}) for name, caption in captions]
    (scratch / "captions.jsonl").write_text("\n".join(records))
    settle(scratch)
    with chdir(scratch):  # the manifest names the file
        embed_texts(TextEncoder("clip"), "captions.jsonl", folder / "embedded", shard_rows=3, on_bad_rows="skip")
    return [["a", "b"], ["d", "e"]]


def make_projector(folder: Path, image: np.ndarray) -> list[list[float]]:
    torch.manual_seed(0)
    gpt = {"model_type": "gpt2", "n_embd": 6, "n_head": 1, "n_layer": 1, "vocab_size": 10}
    config = ReVisionConfig(
        gpt, embedding_dim=DIM, image_token_id=9, projector_dim=5, num_visual_tokens=4, num_projected_tokens=2
    )
    model = ReVisionForCausalLM(config)
    for parameter in model.projector.parameters():
        parameter.data.normal_(std=0.5)
    config.save_pretrained(folder)
    model.save_projector(folder / "projector.safetensors")
    tokens: list[list[float]] = model.projector(torch.from_numpy(image[:2])).tolist()
    return tokens


if __name__ == "__main__":
    main()
