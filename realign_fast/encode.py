"""Texts and images through a dual encoder: as rows in memory, and into shards with ids.

Any model of transformers that has `get_text_features` or `get_image_features`, such as CLIP (arXiv 2103.00020) and
SigLIP (arXiv 2303.15343). Weights come from safetensors, and no code from a model's repository runs unless asked for.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    import torch
except ModuleNotFoundError as missing:
    raise ImportError("realign_fast.encode needs torch: pip install 'realign-fast[train]'") from missing

from ._extras import import_extra
from ._items import Id, ImageFolder, Item, Items, TextFile
from ._native import _C
from ._progress import progress as show_progress
from .backends import count_threads
from .io._prefetch import prefetch
from .io._shards import ShardWriter

__all__ = ["Encoder", "ImageEncoder", "TextEncoder", "embed_images", "embed_texts"]

OnBadRows = Literal["raise", "skip"]

_SAMPLED_ELEMENTS = 64  # of each tensor of weights
_DEPTH = 2  # batches made ahead of the model
_ID_BYTES = 16

Inputs = dict[str, torch.Tensor]


class Encoder(ABC):
    """One side of a dual encoder, frozen; its parameters are those of `TextEncoder`.

    Attributes
    ----------
    name : str
        Where it came from, and a hash of its weights: the same for both sides of one model.
    dim : int
        Of its embeddings.
    batch_size : int
        How many texts or images go through it at once.
    """

    _method: str

    def __init__(
        self,
        name_or_path: str | os.PathLike[str],
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._device = torch.device(device or "cpu")
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {str(self._device)!r}, and torch finds no GPU")
        self.batch_size = batch_size
        transformers = import_extra("transformers", "encoding texts and images", "train")
        options = {"trust_remote_code": trust_remote_code}
        model, loading = transformers.AutoModel.from_pretrained(
            name_or_path, use_safetensors=True, output_loading_info=True, **options
        )
        if not hasattr(model, self._method):
            raise ValueError(
                f"{name_or_path} is a model of type {model.config.model_type!r} without {self._method}: expected a "
                "dual encoder, such as CLIP or SigLIP"
            )
        absent = sorted(loading["missing_keys"])
        if absent:  # they would be random
            raise ValueError(f"{name_or_path} lacks {len(absent)} of the model's weights, the first is {absent[0]!r}")
        path = Path(name_or_path)
        label = path.resolve().name if path.is_dir() else str(name_or_path)
        self.name = f"{label}@{_hash_of(model.state_dict())}"
        self._model = model.requires_grad_(False).eval().to(self._device, dtype)
        self._load_processor(transformers, name_or_path, options)
        self.dim = self(self._some()).shape[1]

    @abstractmethod
    def _load_processor(self, transformers: Any, name_or_path: Any, options: dict[str, Any]) -> None:
        """Load what makes the model's inputs."""

    @abstractmethod
    def _some(self) -> list[Any]:
        """Return a text or image that any model takes."""

    def prepare(self, item: Any) -> Any:
        """Return a text or image after what is done with each alone; called in several threads."""
        return item

    @abstractmethod
    def collate(self, prepared: list[Any]) -> Inputs:
        """Return the model's inputs for some that are prepared."""

    def features(self, inputs: Inputs) -> torch.Tensor:
        """Return the embeddings `(n, dim)` float32, on the encoder's device, of what `collate` returns."""
        dtype = self._model.dtype
        moved = {
            key: value.to(self._device, dtype if value.is_floating_point() else None) for key, value in inputs.items()
        }
        try:
            with torch.no_grad():
                found: Any = getattr(self._model, self._method)(**moved)
        except torch.cuda.OutOfMemoryError:
            raise MemoryError(
                f"a batch of {self.batch_size} does not fit on {self._device}: choose a smaller batch_size"
            ) from None
        features: torch.Tensor = found if torch.is_tensor(found) else found.pooler_output
        if features.ndim != 2:
            raise ValueError(f"{self._method} of {self.name} gives {tuple(features.shape)}, expected one row each")
        return features.float()

    def __call__(self, items: list[Any]) -> torch.Tensor:
        """Return the embeddings `(n, dim)`, float32, on the encoder's device, as the model gives them.

        Raises
        ------
        MemoryError
            If a batch does not fit on the device.
        TypeError
            If `items` is text and no list.
        """
        if isinstance(items, str):
            raise TypeError("expected a list of texts, got a text")
        if not items:
            return torch.empty(0, self.dim, device=self._device)
        parts = [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        return torch.cat([self.features(self.collate([self.prepare(item) for item in part])) for part in parts])


class TextEncoder(Encoder):
    """The text side of a dual encoder: called with a list of texts, it returns their embeddings.

    Texts are padded and cut off as the model was trained: those of SigLIP padded to its full length. It can be pickled.

    Parameters
    ----------
    name_or_path
        Of a model of transformers with `get_text_features` and its tokenizer.
    device
        By default the CPU.
    dtype
        In which it computes; by default that of its weights.
    trust_remote_code
        Whether code from the model's repository may run.
    batch_size
        How many texts go through it at once.

    Raises
    ------
    ImportError
        If transformers is not installed.
    OSError
        If there is no such model, or none in safetensors.
    ValueError
        If it has no text side, weights are missing, its tokenizer has no padding token, or there is no such device.
    """

    _method = "get_text_features"

    def _load_processor(self, transformers: Any, name_or_path: Any, options: dict[str, Any]) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path, **options)
        if self._tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of {name_or_path} has no padding token")
        config = self._model.config
        limit = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
        longest = self._tokenizer.model_max_length
        self._options = {"max_length": longest if limit is None else min(longest, limit), "truncation": True}
        if config.model_type.startswith("siglip"):  # trained on texts of one length, without a mask
            self._options |= {"padding": "max_length", "return_attention_mask": False}
        else:
            self._options |= {"padding": True}

    def _some(self) -> list[Any]:
        return ["a"]

    def collate(self, prepared: list[str]) -> Inputs:
        """Return tokens, padded."""
        return dict(self._tokenizer(prepared, return_tensors="pt", **self._options))


class ImageEncoder(Encoder):
    """The image side of a dual encoder: called with a list of Pillow images, it returns their embeddings.

    The parameters are those of `TextEncoder`, of a model with `get_image_features` and its image processor; so are the
    errors.
    """

    _method = "get_image_features"

    def _load_processor(self, transformers: Any, name_or_path: Any, options: dict[str, Any]) -> None:
        self._processor = transformers.AutoImageProcessor.from_pretrained(name_or_path, **options)

    def _some(self) -> list[Any]:
        return [import_extra("PIL.Image", "encoding images", "train").new("RGB", (32, 32))]

    def prepare(self, item: Any) -> Inputs:
        """Return pixels as the model takes them, and what else it wants to know of an image."""
        return dict(self._processor(images=item, return_tensors="pt"))

    def collate(self, prepared: list[Inputs]) -> Inputs:
        """Return them as one batch."""
        return {key: torch.cat([each[key] for each in prepared]) for key in prepared[0]}


def _hash_of(weights: dict[str, torch.Tensor]) -> str:
    """Return a hash of some elements of each tensor, the same for equal weights."""
    hasher = _C.XXH64()
    for name in sorted(weights):
        flat = weights[name].reshape(-1)
        count = min(len(flat), _SAMPLED_ELEMENTS)
        places = torch.arange(count) * (len(flat) - 1) // max(1, count - 1)
        hasher.update(f"{name} {flat.dtype} {tuple(weights[name].shape)}".encode())
        hasher.update(flat[places].view(torch.uint8).numpy())
    return str(hasher.hexdigest())


def embed_texts(
    encoder: TextEncoder,
    texts: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    id_column: str = "id",
    text_column: str | None = None,
    dtype: str = "float32",
    shard_rows: int = 10_000,
    on_bad_rows: OnBadRows = "raise",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Embed the texts of a file into a folder of shards, `embed_00000.npy` and so on, with the ids beside each.

    Each shard is written whole or not at all, with `realign-manifest.json`, which names the encoder: `fit` takes it
    from there, and `realign verify` checks the folder.

    Parameters
    ----------
    encoder
        Of texts.
    texts
        A file: `.txt`, one text a line, of which ids are the numbers of the lines, from 0; `.jsonl`, or `.json`, an
        array; `.csv`; or `.parquet`.
    out_dir
        Made if missing.
    id_column, text_column
        Under which objects and rows have ids, text or integers, and text; by default `caption`, or the first answer in
        `conversations`, as LLaVA and Bunny write them, or `text`. Ids in csv are text.
    dtype
        Of the rows written: "float16" or "float32".
    shard_rows
        How many texts make a shard.
    on_bad_rows
        What becomes of empty texts, rows that cannot be read, and texts whose embedding is zero or not finite: "raise",
        or "skip", which leaves them out and names them in the manifest.
    resume, overwrite
        What to do with a folder that is not empty: go on where an earlier run ended, or start again.
    progress
        Show progress on stderr.

    Returns
    -------
    dict
        `encoder`, `dim`, `files`, `skipped_files` of an earlier run, `rows`, `bytes`, `bad_rows` that were left out,
        `left_out`, which of them this run left out and why, the first hundred, and `seconds`.

    Raises
    ------
    FileExistsError
        If `out_dir` is not empty and neither `resume` nor `overwrite` is set.
    ImportError
        If pyarrow is not installed.
    OSError
        If a file cannot be read or written, or there is not enough space.
    ValueError
        If an input is wrong or has changed, or the job to resume was another one.
    """
    items = TextFile(texts, id_column, text_column)
    job = {"side": "text", "id_column": id_column, "text_column": text_column}
    return _embed(encoder, items, out_dir, job, dtype, shard_rows, on_bad_rows, resume, overwrite, progress)


def embed_images(
    encoder: ImageEncoder,
    folder: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    shard_rows: int = 10_000,
    on_bad_rows: OnBadRows = "raise",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Embed the images in a folder and those below it, in natural order, as `embed_texts` does texts.

    Their ids are their paths in the folder without suffix. They are turned upright and made RGB. Pillow's limit of
    pixels holds: a larger image is a bad row, as one that cannot be read is.

    The parameters, the result and the errors are those of `embed_texts`.
    """
    items = ImageFolder(folder, encoder.prepare)
    job = {"side": "image"}
    return _embed(encoder, items, out_dir, job, dtype, shard_rows, on_bad_rows, resume, overwrite, progress)


def _embed(
    encoder: Encoder,
    items: Items,
    out_dir: str | os.PathLike[str],
    job: dict[str, Any],
    dtype: str,
    shard_rows: int,
    on_bad_rows: OnBadRows,
    resume: bool,
    overwrite: bool,
    progress: bool,
) -> dict[str, Any]:
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be float16 or float32, got {dtype!r}")
    if shard_rows < 1:
        raise ValueError(f"shard_rows must be at least 1, got {shard_rows}")
    if on_bad_rows not in ("raise", "skip"):
        raise ValueError(f"on_bad_rows must be raise or skip, got {on_bad_rows!r}")
    job = {"command": "embed", "encoder": encoder.name, "dtype": dtype, "shard_rows": shard_rows, **job}
    job |= {"on_bad_rows": on_bad_rows, "unit_norm": False}
    count = items.num_items
    ranges = [(start, min(start + shard_rows, count)) for start in range(0, count, shard_rows)]
    names = [f"{items.name}[{start}:{stop}]" for start, stop in ranges]
    prints = items.fingerprints(ranges)
    inputs = [{"name": name, "fingerprint": each} for name, each in zip(names, prints, strict=True)]
    shard_bytes = min(shard_rows, count) * (encoder.dim * np.dtype(dtype).itemsize + _ID_BYTES)
    with ShardWriter(out_dir, inputs, job, shard_bytes, resume=resume, overwrite=overwrite) as writer:
        before = sum(stop - start for number, (start, stop) in enumerate(ranges) if number in writer.finished)
        with (
            show_progress("embed", count, before, enabled=progress, unit=items.unit) as advance,
            ThreadPoolExecutor(count_threads(None), "realign-prepare") as pool,
        ):
            run = _Run(encoder, on_bad_rows == "skip", pool if items.decoded else None)
            stream = iter(items)
            for number, (start, stop) in enumerate(ranges):
                part = islice(stream, stop - start)
                if number in writer.finished:
                    deque(part, maxlen=0)
                    continue
                shard = run.embed(part, np.empty((stop - start, encoder.dim), dtype), advance)
                if items.fingerprints([(start, stop)]) != [prints[number]]:
                    raise ValueError(f"{names[number]} has changed since the job began: start it again with overwrite")
                writer.write(number, *shard)
        return {"encoder": encoder.name, "dim": encoder.dim, **writer.finish()}


class _Batch(NamedTuple):
    """Some items, read: how many, ids and places of the usable ones, the model's inputs for these, what is left out."""

    num_items: int
    ids: list[Id]
    places: list[str]
    inputs: Inputs
    left_out: list[str]


class _Run:
    """Makes shards, with the rules for items that are not usable."""

    def __init__(self, encoder: Encoder, skip: bool, pool: ThreadPoolExecutor | None) -> None:
        self._encoder, self._skip = encoder, skip
        self._map: Any = map if pool is None else pool.map
        self._id_type: type[Id] | None = None

    def embed(
        self, items: Iterator[Item], values: NDArray[Any], advance: Callable[[int], None]
    ) -> tuple[NDArray[Any], list[Id], list[str]]:
        """Fill `values` with the embeddings of items; return those there are `(n, dim)`, ids, and what is left out."""
        ids: list[Id] = []
        left_out: list[str] = []
        dtype = getattr(torch, values.dtype.name)
        with closing(prefetch(self._batches(items), _DEPTH)) as batches:
            for batch in batches:
                left_out += batch.left_out
                if batch.ids:
                    rows = self._encoder.features(batch.inputs).to(dtype).cpu().numpy()
                    good = np.isfinite(rows).all(axis=1) & rows.any(axis=1)
                    reason = f"its embedding is zero or not finite in {values.dtype}"
                    left_out += [self._bad(batch.places[place], reason) for place in np.flatnonzero(~good)]
                    found = [each for each, usable in zip(batch.ids, good, strict=True) if usable]
                    values[len(ids) : len(ids) + len(found)] = rows[good]
                    ids += found
                advance(batch.num_items)
        return values[: len(ids)], ids, left_out

    def _batches(self, items: Iterator[Item]) -> Generator[_Batch, None, None]:
        while part := list(islice(items, self._encoder.batch_size)):
            batch = _Batch(len(part), [], [], {}, [])
            prepared = []
            for item, found in zip(part, self._map(self._read, part), strict=True):
                if isinstance(found, Exception):
                    batch.left_out.append(self._bad(item.place, found))
                    continue
                self._check_id(item.place, found[0])
                batch.ids.append(found[0])
                batch.places.append(item.place)
                prepared.append(found[1])
            yield batch._replace(inputs=self._encoder.collate(prepared)) if prepared else batch

    @staticmethod
    def _read(item: Item) -> tuple[Id, Any] | Exception:
        try:
            return item.read()
        except (ValueError, OSError) as error:
            return error

    def _check_id(self, place: str, found: Id) -> None:
        self._id_type = self._id_type or type(found)
        if not isinstance(found, self._id_type):
            expected = "text" if self._id_type is str else "integers"
            raise ValueError(f"{place}: its id is {found!r}, those before are {expected}")

    def _bad(self, place: str, reason: object) -> str:
        """Return what is to be said of an item that is left out; raise it where none may be."""
        if not self._skip:
            raise ValueError(f"{place}: {reason} (on_bad_rows='skip' leaves such out)")
        return f"{place}: {reason}"
