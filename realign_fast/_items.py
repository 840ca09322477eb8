"""Texts and images to be embedded, one after the other from their files."""

from __future__ import annotations

import csv
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ._extras import import_extra
from .io._arrow import arrow_errors, import_pyarrow
from .io._fingerprint import combined, fingerprint
from .io._json import JsonObjects
from .io.sources import natural_order

Id = int | str

_IMAGES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
_BATCH_ROWS = 1 << 12
_TEXTS = ("caption", "conversations", "text")
_ANSWERS = ("gpt", "assistant")


class Item(NamedTuple):
    """A text or an image, not yet looked at.

    Attributes
    ----------
    place : str
        Where it lies, for errors.
    read : callable
        Returns its id and the text or image; raises ValueError or OSError where it is not usable.
    """

    place: str
    read: Callable[[], tuple[Id, Any]]


class Items(ABC):
    """What is to be embedded, in order.

    Attributes
    ----------
    name : str
    unit : str
        What the items are.
    num_items : int
    decoded : bool
        Whether reading one takes computing: then it pays to read several at once.
    """

    name: str
    unit: str
    num_items: int
    decoded: bool

    @abstractmethod
    def __iter__(self) -> Iterator[Item]: ...

    @abstractmethod
    def fingerprints(self, ranges: list[tuple[int, int]]) -> list[str]:
        """Return for each range of items, from the first to before the last, a hash that changes where they do."""


class TextFile(Items):
    """Texts in a file: `.txt`, one a line; `.jsonl` or `.json`, objects; `.csv` or `.parquet`, rows of columns.

    Parameters
    ----------
    path
        Of the file, UTF-8 but for parquet.
    id_column
        Under which objects and rows have their ids, text or integers (in csv, text). Of lines it is their number,
        from 0.
    text_column
        Under which they have the text: by default `caption`, or the first answer in `conversations`, as LLaVA and
        Bunny write them, or `text`.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If its suffix is none of these, it is damaged, has no such columns or no texts.
    """

    unit = "texts"
    decoded = False

    def __init__(self, path: str | os.PathLike[str], id_column: str, text_column: str | None) -> None:
        self._path = Path(path)
        self.name = self._path.name
        kinds: dict[str, Callable[[], Iterator[Any]]] = {
            ".txt": self._lines,
            ".jsonl": self._objects,
            ".json": self._objects,
            ".csv": self._csv_rows,
            ".parquet": self._parquet_rows,
        }
        suffix = self._path.suffix.lower()
        if suffix not in kinds:
            raise ValueError(f"{path}: texts must be in a file of suffix {', '.join(kinds)}")
        self._entries = kinds[suffix]
        self._id_column, self._text_column = id_column, text_column
        self.num_items = sum(1 for _ in self._entries())
        if self.num_items == 0:
            raise ValueError(f"{path} holds no texts")

    def __iter__(self) -> Iterator[Item]:
        for number, entry in enumerate(self._entries()):
            yield Item(f"{self._path}: row {number}", partial(self._read, number, entry))

    def fingerprints(self, ranges: list[tuple[int, int]]) -> list[str]:
        """Return the hash of the file for each."""
        return [fingerprint(self._path)] * len(ranges)

    def _read(self, number: int, entry: Any) -> tuple[Id, str]:
        if isinstance(entry, bytes):
            return number, _checked_text(entry.decode().rstrip("\r\n"))
        found = _checked_id(entry.get(self._id_column), self._id_column)
        return found, _checked_text(_text_of(entry, self._text_column))

    def _lines(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            yield from file

    def _objects(self) -> Iterator[dict[str, Any]]:
        return JsonObjects([self._path]).scan()

    def _csv_rows(self) -> Iterator[dict[str, str]]:
        with self._path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            self._check_columns(_decoded(self._path, lambda: rows.fieldnames or ()))
            while (row := _decoded(self._path, next, rows, None)) is not None:
                yield row

    def _parquet_rows(self) -> Iterator[dict[str, Any]]:
        pa = import_pyarrow(self._path)
        from pyarrow import parquet

        with arrow_errors(pa, self._path), parquet.ParquetFile(self._path) as file:
            columns = self._check_columns(file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                yield from batch.to_pylist()

    def _check_columns(self, names: Iterable[str]) -> list[str]:
        """Return which columns are needed of those there are."""
        texts = _TEXTS if self._text_column is None else (self._text_column,)
        found = [name for name in texts if name in names]
        if self._id_column not in names or not found:
            raise ValueError(
                f"{self._path} must have columns {self._id_column!r} and {' or '.join(map(repr, texts))}, "
                f"got {list(names)}: choose others by id_column and text_column"
            )
        return [self._id_column, *found]


def _decoded(path: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    """Call a reader of text, and name the file in its errors."""
    try:
        return read(*arguments)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _text_of(record: dict[str, Any], column: str | None) -> Any:
    """Return the text of a record, None where it has none."""
    if column is not None:
        return record.get(column)
    if (caption := record.get("caption")) is not None:
        return caption
    turns = record.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("from") in _ANSWERS:
            return turn.get("value")
    return record.get("text")


def _checked_text(text: Any) -> str:
    if not isinstance(text, str | None):
        raise ValueError(f"its text must be text, got {str(text)[:40]!r}")
    if text is None or not text.strip():
        raise ValueError("it has no text")
    text.encode()  # fails for halves of surrogate pairs, which JSON can hold
    return text


def _checked_id(found: Any, column: str) -> Id:
    if isinstance(found, int) and not isinstance(found, bool) and -(2**63) <= found < 2**63:
        return found
    if not isinstance(found, str):
        raise ValueError(f"its {column!r} must be text or an integer of 64 bits, got {str(found)[:40]!r}")
    found.encode()
    return found


class ImageFolder(Items):
    """All images in a folder and those below it, in natural order; ids are their paths in it without suffix.

    Parameters
    ----------
    folder
        Hidden files and folders in it are left out; links to folders are followed.
    prepare
        What becomes of each image, a Pillow image in RGB, upright, when it is read.

    Raises
    ------
    OSError
        If there is no such folder or it holds no images.
    ValueError
        If two images would have one id.
    """

    unit = "images"
    decoded = True

    def __init__(self, folder: str | os.PathLike[str], prepare: Callable[[Any], Any]) -> None:
        self._folder, self._prepare = Path(folder), prepare
        self.name = self._folder.resolve().name
        if not self._folder.is_dir():
            raise NotADirectoryError(f"{folder} must be a directory of images")
        self._paths = sorted(_images_in(self._folder, ()), key=natural_order)
        self.num_items = len(self._paths)
        if self.num_items == 0:
            raise FileNotFoundError(f"{folder} holds no images ({', '.join(sorted(_IMAGES))})")
        ids: dict[str, Path] = {}
        for path in self._paths:
            other = ids.setdefault(self._id(path), path)
            if other is not path:
                raise ValueError(f"{other} and {path} would both have the id {self._id(path)!r}")

    def _id(self, path: Path) -> str:
        return path.relative_to(self._folder).with_suffix("").as_posix()

    def __iter__(self) -> Iterator[Item]:
        for path in self._paths:
            yield Item(str(path), partial(self._read, path))

    def fingerprints(self, ranges: list[tuple[int, int]]) -> list[str]:
        """Return hashes of names, sizes and times of change."""
        return [combined([*map(self._state, self._paths[start:stop])]) for start, stop in ranges]

    def _state(self, path: Path) -> str:
        status = path.stat()
        return f"{path.relative_to(self._folder).as_posix()!r} {status.st_size} {status.st_mtime_ns}\n"

    def _read(self, path: Path) -> tuple[Id, Any]:
        found = _checked_id(self._id(path), "path")
        return found, self._prepare(_open_image(path))


def _images_in(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """Yield the images in a folder; `above` are those in which it lies, as links may lead in a circle."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in os.scandir(folder):
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images_in(path, (*above, real))
        elif path.suffix.lower() in _IMAGES:
            yield path


def _open_image(path: Path) -> Any:
    pil = import_extra("PIL.Image", "reading images", "train")
    ops = import_extra("PIL.ImageOps", "reading images", "train")
    try:
        with pil.open(path) as image:
            return ops.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise whatever they please, Pillow's limit of pixels something of its own
        raise ValueError(f"no usable image: {str(error) or type(error).__name__}") from error
