"""The scripts of `recipes/`, each run as a user would, in a folder of embeddings."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import realign_fast as rf
from realign_fast.revision.data import PLAIN_TEMPLATE

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: path for path in (ROOT / "tests" / "recipes").glob("*.py")}
DIM, COUNT, SHARDS = 24, 1200, 2
CLASSES = {"a": "red box", "b": "green box", "c": "blue ball", "d": "red ball", "e": "green ring"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Return a folder with embeddings of five classes on two sides, their ids, captions, and a language model."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    labels = rng.choice(list(CLASSES), COUNT)
    ids = [f"{label}{number}" for number, label in enumerate(labels)]
    centres = {label: rng.normal(size=DIM) for label in CLASSES}
    for side, gap in (("text", 1.0), ("image", -1.0)):
        (folder / side).mkdir()
        rows = np.array([centres[label] for label in labels]) + gap + 0.4 * rng.normal(size=(COUNT, DIM))
        rows = rows.astype(np.float32)
        for number, part in enumerate(np.array_split(np.arange(COUNT), SHARDS)):
            np.save(folder / side / f"part_{number}.npy", rows[part])
            table = pa.table({"id": [ids[row] for row in part]})
            parquet.write_table(table, folder / side / f"part_{number}.columns.parquet")
        if side == "text":
            captions = {"id": ids, "caption": [CLASSES[label] for label in labels], "embedding": list(rows)}
            parquet.write_table(pa.table(captions), folder / "captions.parquet")
    turns = [{"from": "human", "value": "<image>\nwhat is this"}]
    records = [
        {"id": name, "image": f"{name}.jpg", "conversations": [*turns, {"from": "gpt", "value": CLASSES[name[0]]}]}
        for name in ids[:96]
    ]
    (folder / "llava.json").write_text(json.dumps(records))
    words = ["<pad>", "<unk>", "<end>", "what", "is", "this", "red", "green", "blue", "box", "ball", "ring"]
    base = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=base, chat_template=PLAIN_TEMPLATE, **special).save_pretrained(
        folder / "llm"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llm")
    return folder


@pytest.fixture
def run(world, tmp_path):
    """Return a function that runs a recipe in a copy of that folder, and returns what it printed and the folder."""
    folder = shutil.copytree(world, tmp_path / "world")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}

    def run(name: str) -> tuple[str, Path]:
        command = [sys.executable, str(RECIPES[name])]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        # Other packages warn of each other; of what is ours, or what the script does, none may.
        assert not re.search(r"(realign_fast|recipes)/\S+:\d+: \w*Warning", done.stderr), done.stderr
        return done.stdout, folder

    return run


def losses_in(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"loss ([0-9.]+)", text)]


@pytest.mark.parametrize("path", RECIPES.values(), ids=RECIPES)
def test_recipes_are_short_say_what_they_show_and_are_linked_and_run_here(path):
    code = path.read_text()
    assert len(ast.get_docstring(ast.parse(code)) or "") > 100
    assert len(code.splitlines()) <= 60
    assert f"test_{path.stem}" in globals()
    assert f"(tests/recipes/{path.name})" in (ROOT / "README.md").read_text()


def test_dataloader(run):
    said, folder = run("dataloader")
    gaps = re.findall(rf"epoch \d: {COUNT} rows, ([0-9.]+) from the images", said)
    assert len(gaps) == 2
    assert max(map(float, gaps)) < 0.05
    assert f"epoch 2, in two parts: {COUNT} rows, {COUNT} of them different" in said
    assert (folder / "loader.pt").exists()


def test_lightning_projector(run):
    said, folder = run("lightning_projector")
    accuracy = float(re.findall(r"accuracy on images: ([0-9.]+)", said)[0])
    assert accuracy > 0.9
    state = torch.load(folder / "projector.ckpt", weights_only=True)["state_dict"]
    assert state["layers.0.weight"].shape == (32, DIM)


def test_accelerate_loop(run):
    said, folder = run("accelerate_loop")
    losses = losses_in(said)
    assert len(losses) == 3
    assert losses[-1] < 0.7 * losses[0]
    assert (folder / "state" / "model.safetensors").exists()


def test_hugging_face_datasets(run):
    said, folder = run("hugging_face_datasets")
    found = re.findall(r"(\d+) rows with id, caption, embedding: gap ([0-9.]+), now ([0-9.]+)", said)
    ((rows, before, after),) = found
    assert int(rows) == COUNT
    assert float(after) < 0.05 * float(before)
    again = rf.fit(folder / "aligned", folder / "image")
    assert np.linalg.norm(again.source.mean - again.target.mean) == pytest.approx(float(after), abs=1e-3)


def test_llava(run):
    said, folder = run("llava")
    losses = losses_in(said)
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    names = {f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert set(torch.load(folder / "mm_projector.bin", weights_only=True)) == names
