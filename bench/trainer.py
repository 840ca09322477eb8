"""Training steps with embeddings loaded and aligned on their way, against aligned tensors that lie in memory."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from _tables import arguments, report, row

from realign_fast import fit
from realign_fast.benchmark import interleave, machine, rows_of, summarise
from realign_fast.data import EmbeddingDataset
from realign_fast.revision import Projector, ReVisionConfig, ReVisionForCausalLM
from realign_fast.revision.data import PLAIN_TEMPLATE, Records, ReVisionCollator, ReVisionDataset, add_image_token

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


def projection(rounds: int) -> list[dict]:
    """Compare the projection of one embedding an image with that of as many copies as there are visual tokens."""
    once, each = (
        Projector(ReVisionConfig(GPT2Config(), DIM, 0, num_visual_tokens=count), HIDDEN) for count in (576, 1)
    )
    rows = torch.randn(BATCH, DIM)
    copies = rows.repeat_interleave(576, 0)
    multiplied = []
    with torch.no_grad():
        hook = once[0].register_forward_pre_hook(lambda _, inputs: multiplied.append(len(inputs[0])))
        once(rows)
        hook.remove()
        times = interleave({"once": lambda: once(rows), "copies": lambda: each(copies)}, rounds)
    ours, theirs = summarise(times["once"]), summarise(times["copies"])
    what, peer = f"projector, {BATCH} embeddings to 576 tokens each", "projecting 576 copies"
    speedup = theirs["median_s"] / ours["median_s"]
    return [
        row(f"{what}: rows it multiplies", multiplied[0], peer, len(copies) / multiplied[0], "576x", 0.0, "rows"),
        row(what, ours["median_s"] * 1e3, peer, speedup, "none", ours["spread"], "ms"),
    ]


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    count, steps, rounds = (512, 4, 2) if options.quick else (50_000, 4, 31)
    torch.manual_seed(0)
    tokenizer = tokenizer_of()
    config = GPT2Config(
        vocab_size=VOCABULARY + 1, bos_token_id=None, n_embd=HIDDEN, n_layer=4, n_head=4, n_positions=64, eos_token_id=0
    )
    token = add_image_token(tokenizer)
    model = ReVisionForCausalLM.from_language_model(GPT2LMHeadModel(config), embedding_dim=DIM, image_token_id=token)
    model.freeze_language_model()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, count)
        alignment = fit(folder / "text.npy", rows_of(5000, DIM, "float32") + 0.01)
        embeddings = EmbeddingDataset(folder / "text.npy", index=folder / "ids.index")
        begin = time.perf_counter()
        samples = ReVisionDataset(Records(folder / "captions.jsonl", embeddings=embeddings), tokenizer)
        joined = count / (time.perf_counter() - begin)
        aligned = torch.from_numpy(alignment.transform(np.load(folder / "text.npy"), dtype="float16"))
        plain = ReVisionDataset(Records(folder / "captions.jsonl"), tokenizer)
        ours = DataLoader(samples, BATCH, collate_fn=ReVisionCollator(tokenizer, alignment))
        noisy = DataLoader(samples, BATCH, collate_fn=ReVisionCollator(tokenizer, alignment, noise_std=0.01))
        theirs = DataLoader(InMemory(plain, aligned), BATCH, collate_fn=ReVisionCollator(tokenizer))
        cases = {
            name: steps_of(model, loader, steps)
            for name, loader in (("ours", ours), ("noisy", noisy), ("in memory", theirs))
        }
        found = {name: summarise(times) for name, times in interleave(cases, rounds).items()}
    peer = "aligned tensors in memory"
    what = f"training steps, batch {BATCH}, {DIM} float16, aligned on their way"
    lines = [
        row(
            name,
            steps / found[case]["median_s"],
            peer,
            found["in memory"]["median_s"] / found[case]["median_s"],
            goal,
            found[case]["spread"],
            "/s",
        )
        for name, case, goal in ((what, "ours", "0.98x"), (f"{what}, with noise", "noisy", "none"))
    ]
    lines += projection(rounds)
    lines.append(row("records read and joined by id", joined, "itself", 1.0, "none", 0.0, "/s"))
    report(lines, options.json, machine(("transformers",)), count=count, steps=steps, rounds=rounds)
