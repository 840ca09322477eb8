"""Records and their embeddings as batches for the trainer.

Source: ReVision (arXiv 2602.07026), in which aligned text stands for images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

try:
    import torch
    from jinja2 import TemplateError
    from torch.utils.data import Dataset
except ModuleNotFoundError as missing:
    raise ImportError("realign_fast.revision needs torch: pip install 'realign-fast[train]'") from missing

from .._drift import watch_for
from ..alignment import Alignment, Side
from ._chat import IGNORED, IMAGE_TOKEN, PLAIN_TEMPLATE, Chat, add_image_token, messages_of, text_of
from ._records import Records

__all__ = ["IMAGE_TOKEN", "PLAIN_TEMPLATE", "ReVisionCollator", "ReVisionDataset", "Records", "add_image_token"]

Sample = dict[str, Any]


class ReVisionDataset(Dataset[Sample]):
    """Records as tokens with labels and embeddings, map style, for `ReVisionCollator`.

    A sample is `{"id", "input_ids": list, "labels": list, "row": int, "epoch": int}` and its `"embedding"`, a tensor,
    or, of records without embeddings, the `"text"` to encode. Its ids hold one `<image>`.

    Parameters
    ----------
    records
        With embeddings or without.
    tokenizer
        A fast one with a chat template that tells what the assistant says, ValueError for others. Gets `<image>` as a
        special token, if it has none.
    prompt
        What is asked of the image where a record has a caption and no conversations.
    """

    def __init__(self, records: Records, tokenizer: Any, *, prompt: str = "") -> None:
        self.records, self._prompt, self._chat = records, prompt, Chat(tokenizer)
        # Shared with the workers, which persistent loaders never ask anew.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._sample(0)  # an unsuitable template is found now

    def set_epoch(self, epoch: int) -> None:
        """Choose the noise of the next iteration; the first is 0."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.records)

    def _sample(self, number: int) -> Sample:
        record, row = self.records[number], int(self.records.rows[number])
        try:
            ids, labels = self._chat.encode(messages_of(record, self._prompt))
        except (ValueError, TemplateError) as error:
            raise ValueError(f"{self.records.place(number)}: {error}") from error
        name = record.get(self.records.id_key, row)
        sample = {"id": name, "input_ids": ids, "labels": labels, "row": row, "epoch": int(self._epoch)}
        return sample if self.records.embeddings is not None else {**sample, "text": text_of(record)}

    def __getitem__(self, number: int) -> Sample:
        """Return a sample."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Sample]:
        """Return samples, whose embeddings are read together."""
        samples = [self._sample(number) for number in numbers]
        if self.records.embeddings is not None:
            found = self.records.embeddings.__getitems__([sample["row"] for sample in samples])
            for sample, each in zip(samples, found, strict=True):
                sample["embedding"] = each["embedding"]
        return samples


@dataclass(eq=False)
class ReVisionCollator:
    """Makes a batch of samples: aligns their embeddings, makes room for visual tokens, pads or packs.

    A batch is `{"input_ids", "labels"}`, int64 `(rows, tokens)`, `"embeddings"`, `(n, dim)` or `(n, patches, dim)` in
    the order of their places, and `"attention_mask"` or, packed, `"position_ids"`.

    Parameters
    ----------
    tokenizer
        As `ReVisionDataset` takes it. Without a pad token, the end of text pads.
    alignment, side
        Maps the embeddings, text as "source", images as "target".
    noise_std
        Of noise for training on text, as `Alignment.transform` takes it. A row has the same in any batch, and other
        noise in each epoch, by `seed`.
    num_visual_tokens
        Places of an embedding `(dim,)`; one `(patches, dim)` has a place for each patch.
    max_length
        The most tokens of a sample, visual ones counted, or of a row of packed ones; the rest is cut off. Samples whose
        image or labels are all cut off are left out, with one warning in each worker.
    packing
        Whether samples share rows, filled first-fit decreasing. Positions begin anew with each sample and with the
        padding behind them, by which transformers tells them apart.
    encoder
        Makes embeddings of a list of texts, `(n, dim)` or `(n, patches, dim)`, where samples hold texts.
    dim, dtype
        Of the embeddings that the model takes. The first is checked; the second is by default as they come.
    check_drift
        Whether to watch, at so many rows, that text is what the alignment was fitted on, as `EmbeddingDataset` does.

    Raises
    ------
    ValueError
        If arguments contradict each other, the alignment is of another dimension or encoder, or no token can pad; at a
        batch without any label, naming its ids, or with embeddings of several shapes or another dimension.
    """

    tokenizer: Any
    alignment: Alignment | None = None
    _: KW_ONLY
    side: Side = "source"
    noise_std: float | None = None
    seed: int = 0
    num_visual_tokens: int = 1
    max_length: int | None = None
    packing: bool = False
    encoder: Callable[[list[str]], Any] | None = None
    dim: int | None = None
    dtype: torch.dtype | None = None
    check_drift: bool | int = 1024

    def __post_init__(self) -> None:
        alignment, encoder = self.alignment, getattr(self.encoder, "name", None)
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        if pad is None and end is None:
            raise ValueError("the tokenizer has neither a pad nor an eos token: set tokenizer.pad_token")
        if self.noise_std and (alignment is None or self.side == "target"):
            raise ValueError("noise_std needs an alignment and side='source': noise is for text, and scaled to its map")
        if self.packing and self.max_length is None:
            raise ValueError("packing needs max_length, the length of the rows")
        if alignment is not None and self.dim not in (None, alignment.dim):
            raise ValueError(f"alignment has dimension {alignment.dim}, the model takes embeddings of {self.dim}")
        if alignment is not None and alignment.encoder and encoder and encoder != alignment.encoder:
            raise ValueError(f"the alignment was fitted on {alignment.encoder!r}, the encoder is {encoder!r}")
        self._pad, self._image = end if pad is None else pad, add_image_token(self.tokenizer)
        self._watch = watch_for(alignment, self.check_drift) if alignment and self.side == "source" else None
        self._warned = False

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Return the batch of these samples."""
        embeddings = self._align(self._stack(samples), samples)
        places = embeddings.shape[1] if embeddings.ndim == 3 else self.num_visual_tokens
        expanded = [self._expand(sample, places) for sample in samples]
        kept = [n for n, (_, labels) in enumerate(expanded) if max(labels) > IGNORED]
        if lost := [sample["id"] for n, sample in enumerate(samples) if n not in kept]:
            problem = f"no label or no image is left by max_length={self.max_length} of the records {lost}"
            if not kept:
                raise ValueError(f"{problem}, the whole batch")
            if not self._warned:
                warnings.warn(f"{problem}: they and others like them are left out", stacklevel=2)
            self._warned = True
        rows = self._pack({n: len(expanded[n][0]) for n in kept}) if self.packing else [[n] for n in kept]
        width = max(sum(len(expanded[n][0]) for n in row) for row in rows)
        ids, labels, mask = (torch.full((len(rows), width), value) for value in (self._pad, IGNORED, 0))
        positions = torch.arange(width).repeat(len(rows), 1)
        for number, row in enumerate(rows):
            end = 0
            for n in row:
                begin, end = end, end + len(expanded[n][0])
                ids[number, begin:end], labels[number, begin:end] = map(torch.tensor, expanded[n])
                mask[number, begin:end] = 1
                positions[number, end:] = torch.arange(width - end)
        batch = {"input_ids": ids, "labels": labels, "embeddings": embeddings[[n for row in rows for n in row]]}
        return batch | ({"position_ids": positions} if self.packing else {"attention_mask": mask})

    def _stack(self, samples: list[Sample]) -> torch.Tensor:
        if "embedding" in samples[0]:
            shapes = {tuple(sample["embedding"].shape) for sample in samples}
            if len(shapes) > 1:
                raise ValueError(f"embeddings of a batch must have one shape, got {sorted(shapes)}")
            return torch.stack([sample["embedding"] for sample in samples])
        if self.encoder is None:
            raise ValueError("the records have no embeddings: pass encoder=, which makes them of text")
        with torch.no_grad():
            found = torch.as_tensor(self.encoder([sample["text"] for sample in samples]))
        if found.ndim not in (2, 3) or len(found) != len(samples):
            raise ValueError(f"the encoder must give a row for each of {len(samples)} texts, got {tuple(found.shape)}")
        return found

    def _align(self, x: torch.Tensor, samples: list[Sample]) -> torch.Tensor:
        if self.dim not in (None, x.shape[-1]):
            raise ValueError(f"embeddings have dimension {x.shape[-1]}, the model takes {self.dim}")
        if self.alignment is None:
            return x.to(self.dtype or x.dtype)
        if self._watch is not None:
            self._watch.look(x.reshape(-1, x.shape[-1]))
        index = np.array([sample["row"] for sample in samples], np.int64)
        if x.ndim == 3:
            index = index[:, None] * x.shape[1] + np.arange(x.shape[1])
        seed = int(np.random.SeedSequence([self.seed, samples[0]["epoch"]]).generate_state(1, np.uint64)[0])
        options: dict[str, Any] = {"side": self.side, "noise_std": self.noise_std, "seed": seed, "index": index}
        return torch.as_tensor(self.alignment.transform(x, dtype=self.dtype, **options))

    def _expand(self, sample: Sample, places: int) -> tuple[list[int], list[int]]:
        """Return ids and labels with room for the visual tokens, cut to the length; without a label if that is cut."""
        ids, labels = sample["input_ids"], sample["labels"]
        at = ids.index(self._image)
        ids = [*ids[:at], *[self._image] * places, *ids[at + 1 :]][: self.max_length]
        labels = [*labels[:at], *[IGNORED] * places, *labels[at + 1 :]][: len(ids)]
        labels[0] = IGNORED  # nothing comes before it, or in a packed row another sample
        return ids, labels if at + places <= len(ids) else [IGNORED]

    def _pack(self, lengths: dict[int, int]) -> list[list[int]]:
        rows: list[list[int]] = []
        for n in sorted(lengths, key=lambda n: -lengths[n]):
            for row in rows:
                if sum(lengths[m] for m in (*row, n)) <= (self.max_length or 0):
                    row.append(n)
                    break
            else:
                rows.append([n])
        return rows
