"""Training steps with embeddings loaded and aligned on their way, against aligned tensors that lie in memory."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from realign_fast import fit
from realign_fast.benchmark import rows_of
from realign_fast.data import EmbeddingDataset
from realign_fast.revision import Projector, ReVisionConfig, ReVisionForCausalLM
from realign_fast.revision.data import PLAIN_TEMPLATE, Records, ReVisionCollator, ReVisionDataset, add_image_token

CHECKED_BY = ("test_revision_data.py", "test_revision_model.py")
DIM, BATCH, NUM_WORDS, HIDDEN = 1280, 64, 24, 256
VOCABULARY = 1000


def write_inputs(folder: Path, count: int) -> None:
    """Write captions of words drawn at random, embeddings in float16 for them, and their ids."""
    rng = np.random.default_rng(0)
    words = rng.integers(VOCABULARY, size=(count, NUM_WORDS))
    with (folder / "captions.jsonl").open("w") as file:
        for number, line in enumerate(words):
            file.write(json.dumps({"id": f"{number:07}", "caption": " ".join(f"w{word}" for word in line)}) + "\n")
    np.save(folder / "text.npy", rows_of(count, DIM, "float16"))
    ids = pa.array(f"{number:07}" for number in range(count))
    parquet.write_table(pa.table({"id": ids}), folder / "text.columns.parquet")


def tokenizer_of() -> PreTrainedTokenizerFast:
    names = ["<end>", *(f"w{number}" for number in range(VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", chat_template=PLAIN_TEMPLATE
    )


class InMemory(Dataset):
    """The same samples, their embeddings aligned beforehand."""

    def __init__(self, samples: ReVisionDataset, aligned: torch.Tensor) -> None:
        self._samples, self._aligned = samples, aligned

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> dict:
        sample = self._samples[number]
        return {**sample, "embedding": self._aligned[sample["row"]]}


def steps_of(model: ReVisionForCausalLM, loader: DataLoader, count: int):
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=5e-4)

    def run() -> None:
        for _, batch in zip(range(count), loader, strict=False):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


@pytest.mark.parametrize("noise_std", [0.0, pytest.param(0.01, marks=pytest.mark.slow)], ids=["aligned", "with noise"])
def test_training_steps(measure, pick, folder, noise_std):
    count, steps = pick(512, 10_000, 50_000), 4
    torch.manual_seed(0)
    tokenizer = tokenizer_of()
    config = GPT2Config(
        vocab_size=VOCABULARY + 1, bos_token_id=None, n_embd=HIDDEN, n_layer=4, n_head=4, n_positions=64, eos_token_id=0
    )
    token = add_image_token(tokenizer)
    model = ReVisionForCausalLM.from_language_model(GPT2LMHeadModel(config), embedding_dim=DIM, image_token_id=token)
    model.freeze_language_model()
    frozen = {name: weight.clone() for name, weight in model.language_model.state_dict().items()}
    write_inputs(folder, count)
    alignment = fit(folder / "text.npy", rows_of(5000, DIM, "float32") + 0.01)
    embeddings = EmbeddingDataset(folder / "text.npy", index=folder / "ids.index")
    begin = time.perf_counter()
    samples = ReVisionDataset(Records(folder / "captions.jsonl", embeddings=embeddings), tokenizer)
    joined = count / (time.perf_counter() - begin)
    aligned = torch.from_numpy(alignment.transform(np.load(folder / "text.npy"), dtype="float16"))
    plain = ReVisionDataset(Records(folder / "captions.jsonl"), tokenizer)
    ours = DataLoader(samples, BATCH, collate_fn=ReVisionCollator(tokenizer, alignment, noise_std=noise_std))
    theirs = DataLoader(InMemory(plain, aligned), BATCH, collate_fn=ReVisionCollator(tokenizer))
    measure(
        f"training steps, aligned on their way{', with noise' if noise_std else ''}",
        steps_of(model, ours, steps),
        {"aligned tensors in memory": steps_of(model, theirs, steps)},
        unit="/s",
        work=steps,
        goals={"aligned tensors in memory": 0.98} if not noise_std else {},
        dtype="float16",
        note=f"batch {BATCH}, {DIM} dimensions",
        rounds=pick(2, 3, 31),
    )
    if not noise_std:
        measure.figure("records read and joined by id", joined, "/s", "", None)
        changed, whole = 0, 0
        for name, weight in model.language_model.state_dict().items():
            changed += int((weight != frozen[name]).sum())
            whole += weight.numel()
        what = "weights of the frozen language model that these steps have changed"
        measure.figure(what, changed, "", f"{whole:,} weights", changed / whole, goal=0.0, at_most=True)


def test_projector(measure, pick):
    """One embedding an image is projected, not as many copies as there are visual tokens."""
    once, each = (
        Projector(ReVisionConfig(GPT2Config(), DIM, 0, num_visual_tokens=count), HIDDEN) for count in (576, 1)
    )
    each.load_state_dict(once.state_dict())
    rows = torch.randn(BATCH, DIM)
    copies = rows.repeat_interleave(576, 0)
    multiplied = []
    what, peer = f"projector, {BATCH} embeddings to 576 tokens each", "projecting 576 copies"
    with torch.no_grad():
        hook = once[0].register_forward_pre_hook(lambda _, inputs: multiplied.append(len(inputs[0])))
        once(rows)
        hook.remove()
        measure(what, lambda: once(rows), {peer: lambda: each(copies)}, unit="ms", rounds=pick(2, 9, 31))
        error = float((once(rows).flatten() - each(copies).flatten()).abs().max())
    measure.figure(
        f"{what}: rows it multiplies",
        multiplied[0],
        "rows",
        peer,
        multiplied[0] / len(copies),
        goal=1 / 576,
        at_most=True,
    )
    measure.figure(f"{what}: largest difference", error, "", "1e-6", error / 1e-6, goal=1.0, at_most=True)
