"""Text from images: their embeddings, brought to where the projector was trained, before a prompt.

Source: ReVision (arXiv 2602.07026), inference on real images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .._files import replacing
from .._progress import progress as show_progress
from ..data import EmbeddingDataset
from ._chat import image_place, messages_of
from .modeling import ReVisionForCausalLM
from .training import alignment_beside, load_tokenizer

__all__ = ["generate"]


def generate(
    model: str,
    output: str | os.PathLike[str],
    *,
    embeddings: Any = None,
    images: str | os.PathLike[str] | None = None,
    encoder: str | None = None,
    index: str | os.PathLike[str] | None = None,
    alignment: str | None = None,
    prompt: str = "",
    chat_template: str | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
    **generation: Any,
) -> dict[str, Any]:
    """Write what a model says of images, for each a line `{"id": ..., "text": ...}` of JSON.

    Parameters
    ----------
    model
        Folder that a stage has written.
    output
        The file, written whole or not at all.
    embeddings, index
        Of images, as `EmbeddingDataset` takes them; without an index the id of a row is its number.
    images, encoder
        Instead, a folder of images, and the dual encoder on whose embeddings the projector was trained.
    alignment
        File of the one whose "target" side maps the embeddings; by default that beside the model.
    prompt, chat_template
        What is asked after the image, and in which template; by default the tokenizer's.
    batch_size, device, dtype
        Of the computation.
    trust_remote_code
        Whether code from the encoder's repository may run.
    progress
        Show progress on stderr.
    **generation
        As `generate` of transformers takes them, such as `max_new_tokens` and `num_beams`.

    Returns
    -------
    dict
        `images`, how many.

    Raises
    ------
    OSError, ValueError
        If a file or an argument is wrong.
    """
    if (embeddings is None) == (images is None) or (images is None) != (encoder is None):
        raise ValueError("pass either embeddings, or images and the encoder that makes embeddings of them")
    found = alignment_beside(model, alignment)
    tokenizer = load_tokenizer(model, chat_template)
    network = ReVisionForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    asked = _prompt(tokenizer, prompt, network.config).to(device)
    if embeddings is not None:
        dataset = EmbeddingDataset(embeddings, index=index)
        total, batches = len(dataset), _from_files(dataset, batch_size)
    else:
        total, batches = _from_images(images, encoder, batch_size, device, trust_remote_code)
    with (
        replacing(Path(output)) as temporary,
        temporary.open("w", encoding="utf-8") as file,
        show_progress("generate", total, enabled=progress, unit="images") as advance,
    ):
        for ids, rows in batches:
            if found is not None:
                rows = found.transform(rows, side="target")
            ids_of_prompt = asked.expand(len(rows), -1)
            new = network.generate(ids_of_prompt, rows.to(device), torch.ones_like(ids_of_prompt), **generation)
            for name, text in zip(ids, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                file.write(json.dumps({"id": name, "text": text.strip()}, ensure_ascii=False) + "\n")
            advance(len(rows))
    return {"images": total}


def _prompt(tokenizer: Any, prompt: str, config: Any) -> torch.Tensor:
    """Return the tokens `(1, length)` that stand before an answer, with room for the visual ones."""
    asked = messages_of({"caption": ""}, prompt)[:-1]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    at = image_place(ids, config.image_token_id)
    return torch.tensor([[*ids[:at], *[config.image_token_id] * config.num_visual_tokens, *ids[at + 1 :]]])


def _from_files(dataset: EmbeddingDataset, batch_size: int) -> Iterator[tuple[list[Any], torch.Tensor]]:
    for start in range(0, len(dataset), batch_size):
        part = dataset.__getitems__(range(start, min(start + batch_size, len(dataset))))
        yield [each["id"] for each in part], torch.stack([each["embedding"] for each in part])


def _from_images(
    folder: Any, name: Any, batch_size: int, device: str, trust_remote_code: bool
) -> tuple[int, Iterator[tuple[list[Any], torch.Tensor]]]:
    from .._items import ImageFolder
    from ..encode import ImageEncoder

    encoder = ImageEncoder(name, device=device, trust_remote_code=trust_remote_code, batch_size=batch_size)
    items = ImageFolder(folder, encoder.prepare)

    def batches() -> Iterator[tuple[list[Any], torch.Tensor]]:
        stream = iter(items)
        while part := [item.read() for item in islice(stream, batch_size)]:
            ids, prepared = zip(*part, strict=True)
            yield list(ids), encoder.features(encoder.collate(list(prepared))).cpu()

    return items.num_items, batches()
