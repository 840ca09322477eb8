"""One seed of the settling experiment: its world, encoder and language model, and what one arm makes of them.

`prepare` makes what all arms of a seed share; `run_arm` trains and tests one arm. Both give the same for equal
arguments on one machine.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup, logging

from realign_fast import fit
from realign_fast.demo import encoder as encoders
from realign_fast.demo import world
from realign_fast.demo.world import Scenes
from realign_fast.geometry.metrics import centroid_gap, cosine_to_pair, recall_at
from realign_fast.revision import ReVisionForCausalLM

logging.set_verbosity_error()
ATTRIBUTES = ("shape", "colour", "size", "place", "relation", "count")
END, ANSWER, IMAGE = (world.VOCABULARY_SIZE + i for i in range(3))


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the published setting has the same stages with the counts of a real model."""

    encoder_pairs: int = 40_000
    encoder_steps: int = 800
    lm_captions: int = 20_000
    lm_steps: int = 400
    lm_layers: int = 2
    lm_hidden: int = 128
    texts: int = 38_400
    pictures: int = 20_000
    visual_tokens: int = 8
    projector_dim: int = 256
    pairs_2: int = 640
    epochs_2: int = 2
    batch: int = 64
    tests: int = 1000
    lm_rate: float = 2e-3
    rate_1: float = 2e-3
    rate_2: float = 1e-4


class Encoder(encoders.DualEncoder):
    """The demo's with 4 x 4 features of a picture at its end, not 2 x 2, and a temperature 3.5 times lower.

    So it tells the attributes of two objects apart, and keeps most of a gap such as CLIP's on COCO, 0.85.
    """

    def __init__(self) -> None:
        super().__init__(logit_scale=350.0)
        layers: list[nn.Module] = []
        for fan_in, fan_out, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride, padding=1), nn.BatchNorm2d(fan_out), nn.ReLU()]
        image_encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, encoders.DIM))
        self.image_encoder = image_encoder.to(memory_format=torch.channels_last)
        self.log_scale.requires_grad_(False)


@dataclass(frozen=True)
class Arm:
    """One way to make the rows that stage 1 trains on. `noise_std` None is the map's own."""

    name: str
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    noise_std: float | None = 0.0
    paired: bool = False
    texts: int = 1
    stage_1: bool = True


def prepare(seed: int, sizes: Sizes) -> dict[str, Any]:
    """Return the embeddings, captions and scenes of a seed, its language model, and a few figures about them."""
    held_out = np.random.default_rng(_seed(seed, "held out")).permutation(len(world.COLOURS))[: len(world.SHAPES)]
    counts = {"encoder": sizes.encoder_pairs, "lm": sizes.lm_captions, "texts": 2 * sizes.texts}
    counts |= {"pictures": sizes.pictures, "stage 2": sizes.pairs_2, "seen": sizes.tests, "unseen": sizes.tests}
    scenes = {name: _sample(count, _seed(seed, name), held_out, name == "unseen") for name, count in counts.items()}

    encoder = encoders.train(
        steps=sizes.encoder_steps, seed=_seed(seed, "encoder"), scenes=scenes["encoder"], make=Encoder
    )
    captions = {name: world.captions(scenes[name], _seed(seed, f"{name} captions")) for name in counts}
    images = {
        name: encoders.embed_images(encoder, world.render(scenes[name], _seed(seed, f"{name} pictures")))
        for name in ("texts", "pictures", "stage 2", "seen", "unseen")
    }
    texts = {name: encoders.embed_texts(encoder, captions[name]) for name in ("texts", "seen")}
    language_model, loss = _train_language_model(scenes["lm"], captions["lm"], seed, sizes)
    return {
        "captions": {name: captions[name] for name in ("texts", "stage 2")},
        "images": {name: torch.from_numpy(rows) for name, rows in images.items()},
        "texts": {name: torch.from_numpy(rows) for name, rows in texts.items()},
        "scenes": {name: list(map(torch.from_numpy, scenes[name])) for name in ("seen", "unseen")},
        "language_model": language_model.state_dict(),
        "figures": {
            "modality gap": centroid_gap(texts["seen"], images["seen"]),
            "recall@1": recall_at(texts["seen"], images["seen"]),
            "language model's loss": loss,
        },
    }


def run_arm(arm: Arm, seed: int, sizes: Sizes, base: dict[str, Any]) -> dict[str, Any]:
    """Train and test one arm on what `prepare` made: zero-shot, and after stage 2."""
    began = time.process_time()
    torch.manual_seed(_seed(seed, "projector"))  # the same first projector in all arms
    language_model = _new_language_model(sizes)
    language_model.load_state_dict(base["language_model"])
    model = ReVisionForCausalLM.from_language_model(
        language_model,
        embedding_dim=encoders.DIM,
        image_token_id=IMAGE,
        projector_dim=sizes.projector_dim,
        num_visual_tokens=sizes.visual_tokens,
        num_projected_tokens=sizes.visual_tokens,
    )
    prompt = [IMAGE] * sizes.visual_tokens + [ANSWER]
    # The statistics come from the texts and from pictures of other scenes.
    count = arm.texts * sizes.texts
    text, pictures = base["texts"]["texts"][:count], base["images"]["pictures"]
    alignment = fit(text, pictures, method=arm.method or "realign", num_threads=1, **arm.options)
    result: dict[str, Any] = {"seed": seed, "arm": arm.name}

    def rows(index: np.ndarray) -> torch.Tensor:
        noise = {"noise_std": arm.noise_std, "seed": seed, "index": index, "num_threads": 1}
        if arm.paired:
            return alignment.transform(base["images"]["texts"][index], side="target", **noise)
        return alignment.transform(text[index], **noise) if arm.method else text[index]

    if arm.stage_1:
        model.freeze_language_model()
        batches = _batches(prompt, base["captions"]["texts"][:count], 1, seed, sizes.batch)
        result["loss"] = _train(model, [*batches], rows, sizes.rate_1)
        model.requires_grad_(True)
    result["zero-shot"] = _test(model, prompt, base)

    batches = _batches(prompt, base["captions"]["stage 2"], sizes.epochs_2, seed, sizes.batch)
    real = base["images"]["stage 2"]
    _train(model, [*batches], lambda index: alignment.transform(real[index], side="target"), sizes.rate_2)
    result["stage 2"] = _test(model, prompt, base)

    image = base["images"]["seen"].numpy()
    source = image if arm.paired else base["texts"]["seen"].numpy()
    mapped = alignment.transform(source, noise_std=0.0) if arm.method and not arm.paired else source
    result |= {"gap": centroid_gap(mapped, image), "cosine": cosine_to_pair(mapped, image)}
    chosen = alignment.report.get("selection", {})
    result["selection"] = {name: chosen.get(name) for name in ("strength", "shrinkage")}
    return result | {"seconds": round(time.process_time() - began, 1)}


def _seed(seed: int, what: str) -> int:
    """Return a seed of its own for everything that is drawn."""
    return zlib.crc32(f"{seed} {what}".encode())


def _sample(count: int, seed: int, held_out: np.ndarray, unseen: bool) -> Scenes:
    """Return scenes without the held-out colour of any shape, or scenes that all show one."""
    scenes = world.sample_scenes(count * (8 if unseen else 2), seed)
    shows = scenes.colour == held_out[scenes.shape]
    shows[:, 1] &= scenes.num_objects == 2
    chosen = np.flatnonzero(shows.any(axis=1) == unseen)[:count]
    return Scenes(*(values[chosen] for values in scenes))


# The language model learns to turn a telegram, the words that carry meaning in another caption, into a caption.


def _new_language_model(sizes: Sizes) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=IMAGE,
        n_positions=2 * world.MAX_WORDS + 2,
        n_embd=sizes.lm_hidden,
        n_layer=sizes.lm_layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=ANSWER,
        eos_token_id=END,
        pad_token_id=world.PADDING,
    )
    return GPT2LMHeadModel(config)


def _train_language_model(
    scenes: Scenes, captions: list[str], seed: int, sizes: Sizes
) -> tuple[GPT2LMHeadModel, float]:
    torch.manual_seed(_seed(seed, "language model"))
    model = _new_language_model(sizes)
    telegrams = [world.keywords(text) for text in world.captions(scenes, _seed(seed, "telegrams"))]
    epochs = -(-sizes.lm_steps * sizes.batch // len(captions))
    batches = [*_batches([*map(_numbers, telegrams)], captions, epochs, seed, sizes.batch)][: sizes.lm_steps]
    return model, _train(model, batches, None, sizes.lm_rate)


def _numbers(text: str) -> list[int]:
    tokens = world.tokenize([text])[0]
    return tokens[tokens != world.PADDING].tolist()


def _batches(
    prompts: list[Any], captions: list[str], epochs: int, seed: int, batch: int
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Yield the rows of a batch and its tensors: one prompt for all captions, or one each with `ANSWER` after it.

    Rows of like length go together, so that little is padding; the order depends on the seed and the lengths alone.
    """
    tokens = [[*_numbers(text), END] for text in captions]
    own = isinstance(prompts[0], list)
    heads = [[*prompt, ANSWER] for prompt in prompts] if own else [prompts] * len(tokens)
    lengths = np.array([len(head) + len(tail) for head, tail in zip(heads, tokens, strict=True)])
    rng = np.random.default_rng(_seed(seed, "batches"))
    for _ in range(epochs):
        order = rng.permutation(len(tokens))
        groups = [part[np.argsort(lengths[part], kind="stable")] for part in np.array_split(order, 8)]
        chosen = [group[start : start + batch] for group in groups for start in range(0, len(group), batch)]
        for which in rng.permutation(len(chosen)):
            index = chosen[which]
            ids = np.full((len(index), lengths[index].max()), world.PADDING)
            labels = np.full(ids.shape, -100)
            for i, row in enumerate(index):
                first = len(heads[row])
                ids[i, : lengths[row]] = [*heads[row], *tokens[row]]
                labels[i, first : lengths[row]] = tokens[row]
            mask = np.arange(ids.shape[1]) < lengths[index, None]
            parts = {"input_ids": ids, "labels": labels, "attention_mask": mask.astype(np.int64)}
            yield index, {name: torch.from_numpy(values) for name, values in parts.items()}


def _train(model: nn.Module, batches: list[Any], rows: Any, rate: float) -> float:
    """Train on all batches, embeddings of their rows with them where `rows` gives any; return the last tenth's loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * len(batches)), len(batches))
    model.train()
    losses = []
    for index, inputs in batches:
        loss = model(**inputs, **({} if rows is None else {"embeddings": rows(index)})).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _test(model: ReVisionForCausalLM, prompt: list[int], base: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Caption the held-out pictures greedily, and return the shares of right attributes."""
    results = {}
    for name in ("seen", "unseen"):
        images = base["images"][name]
        input_ids = torch.tensor([prompt] * len(images))
        out = model.generate(
            input_ids, images, torch.ones_like(input_ids), max_new_tokens=world.MAX_WORDS + 1, do_sample=False
        ).numpy()
        out[np.cumsum(out == END, axis=1) > 0] = world.PADDING
        scenes = Scenes(*(values.numpy() for values in base["scenes"][name]))
        results[name] = score(world.detokenize(out), scenes)
    return results


def score(captions: list[str], scenes: Scenes) -> dict[str, float]:
    """Return the share of objects (`shape`, `colour`, `size`) or scenes (the rest) that captions get right.

    `relation` counts scenes with two objects only; `mean` is that of the six attributes; `all` the share of scenes of
    which nothing is wrong.
    """
    right: dict[str, list[bool]] = {name: [] for name in (*ATTRIBUTES, "all")}
    for i, said in enumerate(map(world.parse, captions)):
        count, (first, second) = int(scenes.num_objects[i]), scenes.place[i]
        checks = [("count", len(said.shape) == count), ("place", said.place == world.PLACES[first])]
        for name, words in (("shape", world.SHAPES), ("colour", world.COLOURS), ("size", world.SIZES)):
            is_so = [words[value] for value in getattr(scenes, name)[i, :count]]
            checks += [
                (name, said_so == so) for said_so, so in zip([*getattr(said, name), None, None], is_so, strict=False)
            ]
        if count == 2:
            checks.append(("relation", said.relation == ("left of" if first % 3 < second % 3 else "above")))
        for name, is_right in checks:
            right[name].append(is_right)
        right["all"].append(all(is_right for _, is_right in checks))
    shares = {name: float(np.mean(each)) for name, each in right.items()}
    return shares | {"mean": float(np.mean([shares[name] for name in ATTRIBUTES]))}
