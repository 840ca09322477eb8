"""Records and their embeddings as batches for the trainer of ReVision (arXiv 2602.07026)."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .._drift import watch_for
from ..alignment import Alignment, Side
from ..io._json import JsonObjects
from ..io.sources import local_files
from ._chat import IGNORED, IMAGE_TOKEN, PLAIN_TEMPLATE, add_image_token, encode_chat, messages_of

__all__ = ["IMAGE_TOKEN", "PLAIN_TEMPLATE", "ReVisionCollator", "ReVisionDataset", "Records", "add_image_token"]

_RECORDS_AT_ONCE, _MAX_NAMED = 4096, 5
Sample = dict[str, Any]


class Records:
    """Records of JSON arrays and JSONL files by number, each read where it lies.

    The files are read once at the start: every record is decoded and looked at, and 32 bytes of it are kept.

    Parameters
    ----------
    paths
        Local files: a path, a glob or a list of such.
    embeddings
        The `realign_fast.data.EmbeddingDataset`, with an `index`, that has an embedding of each record's id.
    id_key
        The key of the ids, text or integers, which are compared as the embeddings have them.
    on_bad_records
        What becomes of records without an embedding, without exactly one `<image>`, or without messages or an answer:
        "raise", or "skip", which leaves them out.

    Attributes
    ----------
    rows : ndarray
        `(n,)` int64, the number of each record's embedding; without embeddings, that of the record among all.
    skipped : dict
        For each reason why records were left out `{"count": int, "first": [place, ...]}`, with at most 5 places.

    Raises
    ------
    OSError, ValueError
        If a file cannot be read or is damaged, an element is no object, a record is bad under "raise", or none is left.
    """

    def __init__(
        self,
        paths: Any,
        *,
        embeddings: Any = None,
        id_key: str = "id",
        on_bad_records: str = "raise",
    ) -> None:
        if on_bad_records not in ("raise", "skip"):
            raise ValueError(f"on_bad_records must be 'raise' or 'skip', got {on_bad_records!r}")
        self.embeddings, self.id_key = embeddings, id_key
        self.skipped: dict[str, dict[str, Any]] = {}
        self._objects = JsonObjects(local_files(paths))
        kept, seen = array("q"), 0
        looked_at = map(self._look, self._objects.scan())
        while some := list(islice(looked_at, _RECORDS_AT_ONCE)):
            rows = range(seen, seen + len(some))
            if embeddings is not None:
                rows = embeddings.locate(["" if problem else name for name, problem in some])
            for number, (row, (name, problem)) in enumerate(zip(rows, some, strict=True), seen):
                if row >= 0 and not problem:
                    kept.extend((number, row))
                    continue
                problem = problem or "no embedding of its id"
                place = f"{self._objects.place(number)} (id {name!r})"
                if on_bad_records == "raise":
                    raise ValueError(f"{place}: {problem}")
                entry = self.skipped.setdefault(problem, {"count": 0, "first": []})
                entry["count"] += 1
                entry["first"] = [*entry["first"], place][:_MAX_NAMED]
            seen += len(some)
        if not kept:
            raise ValueError(f"{paths} hold no record to use; left out: {self.skipped}")
        self._numbers, self.rows = np.array(kept, np.int64).reshape(-1, 2).T.copy()

    def _look(self, record: dict[str, Any]) -> tuple[str, str]:
        """Return the id as text, and what is wrong with the record, if anything."""
        name = record.get(self.id_key)
        try:
            messages_of(record)
            str(name).encode()
        except ValueError as error:
            return str(name), str(error)
        return str(name), "" if self.embeddings is None or isinstance(name, str | int) else "no id"

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, number: int) -> str:
        """Return where a record lies: file, number in it, and byte."""
        return self._objects.place(int(self._numbers[number]))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Read and decode a record; ValueError if its file has changed."""
        return self._objects[int(self._numbers[number])]


class ReVisionDataset(Dataset[Sample]):
    """Records as tokens with labels and embeddings, map style, for `ReVisionCollator`.

    A sample is `{"id", "input_ids": list, "labels": list, "row": int, "epoch": int}` and its `"embedding"`, a tensor,
    or, of records without embeddings, the `"text"` to encode. Its ids hold one `<image>`.

    Parameters
    ----------
    records, tokenizer
        The tokenizer is a fast one with a chat template that tells what the assistant says, ValueError for others. It
        gets `<image>` as a special token, if it has none.
    prompt
        What is asked of the image where a record has a caption and no conversations.
    """

    def __init__(self, records: Records, tokenizer: Any, *, prompt: str = "") -> None:
        self.records, self._tokenizer, self._prompt = records, tokenizer, prompt
        add_image_token(tokenizer)
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
        messages = messages_of(record, self._prompt)
        try:
            ids, labels = encode_chat(self._tokenizer, messages)
        except (ValueError, TemplateError) as error:
            raise ValueError(f"{self.records.place(number)}: {error}") from error
        name = record.get(self.records.id_key, row)
        sample = {"id": name, "input_ids": ids, "labels": labels, "row": row, "epoch": int(self._epoch)}
        if self.records.embeddings is None:
            texts = [record.get("caption"), *(each["content"] for each in messages if each["role"] == "assistant")]
            sample["text"] = texts[0] if isinstance(texts[0], str) else texts[1]
        return sample

    def __getitem__(self, number: int) -> Sample:
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
        Whether samples share rows, filled first-fit decreasing. Positions begin anew with each sample, by which
        transformers tells them apart.
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
        batch without any label, naming its ids, or with embeddings of another dimension.
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
        if self.packing if self.max_length is None else self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, and packing needs it, got {self.max_length}")
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
        kept = [n for n, (_, labels, _) in enumerate(expanded) if labels.max() > IGNORED]
        if lost := [sample["id"] for n, sample in enumerate(samples) if n not in kept]:
            problem = f"no label or no image is left by max_length={self.max_length} of the records {lost}"
            if not kept:
                raise ValueError(f"{problem}, the whole batch")
            if not self._warned:
                warnings.warn(f"{problem}: they and others like them are left out", stacklevel=2)
            self._warned = True
        rows = self._pack({n: len(expanded[n][0]) for n in kept}) if self.packing else [[n] for n in kept]
        ids, labels, positions = (
            pad_sequence([torch.cat([expanded[n][part] for n in row]) for row in rows], True, value)
            for part, value in enumerate((self._pad, IGNORED, -1))
        )
        batch = {"input_ids": ids, "labels": labels, "embeddings": embeddings[[n for row in rows for n in row]]}
        if self.packing:
            return batch | {"position_ids": positions.clamp(min=0)}  # each place that is padded is a sample of its own
        return batch | {"attention_mask": (positions >= 0).long()}

    def _stack(self, samples: list[Sample]) -> torch.Tensor:
        if "embedding" in samples[0]:
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

    def _expand(self, sample: Sample, places: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids, labels and positions with places for the visual tokens; no label if these are cut off."""
        at, longest = sample["input_ids"].index(self._image), self.max_length
        given = (torch.tensor(sample["input_ids"]), self._image), (torch.tensor(sample["labels"]), IGNORED)
        ids, labels = (torch.cat([x[:at], torch.full((places,), new), x[at + 1 :]])[:longest] for x, new in given)
        labels[0 if at + places <= len(ids) else slice(None)] = IGNORED  # the first: what would it be told from?
        return ids, labels, torch.arange(len(ids))

    def _pack(self, lengths: dict[int, int]) -> list[list[int]]:
        rows: list[list[int]] = []
        for n in sorted(lengths, key=lambda n: -lengths[n]):
            fits = (row for row in rows if sum(lengths[m] for m in [*row, n]) <= (self.max_length or 0))
            if (row := next(fits, None)) is None:
                rows.append(row := [])
            row.append(n)
        return rows
