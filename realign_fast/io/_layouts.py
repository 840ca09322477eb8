"""Folders of which other tools say what lies where: those of Hugging Face `datasets` and of clip-retrieval."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from .formats import format_of

_MAX_JSON_BYTES = 64 << 20
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_SHARD = re.compile(r"(.+?)(?:-([0-9]{5})-of-([0-9]{5}))?\.arrow")
_SIDES = {"source": "text_emb", "target": "img_emb"}
_EMBEDDINGS = re.compile(r"(img_emb|text_emb)_([0-9]+)")
_METADATA = re.compile(r"metadata_([0-9]+)\.parquet")


def side_of(folder: Path, side: Literal["source", "target"] | None) -> Path:
    """Return the folder of the side asked for, where `folder` is one of clip-retrieval; any other as it is.

    Raises
    ------
    ValueError
        If it is one of clip-retrieval, but no side is asked for or that side is missing.
    """
    found = {each: folder / name for each, name in _SIDES.items() if (folder / name).is_dir()}
    if not found or any(format_of(path) and path.is_file() for path in folder.iterdir()):
        return folder
    names = " or ".join(str(path) for path in found.values())
    if side is None:
        raise ValueError(f"{folder} holds the embeddings of images and texts: name {names}")
    if side not in found:
        raise ValueError(f"{folder} holds no {_SIDES[side]}: expected it there, or name {names}")
    return found[side]


def metadata_of(path: Path) -> Path | None:
    """Return the file of metadata that clip-retrieval has written with one of embeddings; None where there is none."""
    path = path.absolute()
    match = _EMBEDDINGS.fullmatch(path.stem)
    folder = path.parent.parent / "metadata"
    if match is None or path.parent.name != match[1] or not folder.is_dir():
        return None
    of_that_number = folder / f"metadata_{match[2]}.parquet"
    if of_that_number.is_file():
        return of_that_number
    for each in sorted(folder.iterdir()):  # numbers may be written with more zeros or fewer
        number = _METADATA.fullmatch(each.name)
        if number is not None and int(number[1]) == int(match[2]):
            return each
    return None


def listed_files(folder: Path) -> list[Path] | None:
    """Return the arrow files of a dataset of Hugging Face `datasets`, saved or cached; None for any other folder.

    Raises
    ------
    FileNotFoundError
        If a file that it lists is missing.
    ValueError
        If it has several splits, a selection of rows that is not applied, or lists files outside of it.
    """
    if (folder / _SPLITS).is_file():
        splits = _read(folder / _SPLITS).get("splits")
        names = [str(folder / name) for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        raise ValueError(f"{folder} holds several splits: name one of them: {', '.join(names)[:1000]}")
    if not (folder / _INFO).is_file():
        return None
    if (folder / _STATE).is_file():
        return _saved(folder)
    return _cached(folder)


def _saved(folder: Path) -> list[Path]:
    state = _read(folder / _STATE)
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder} is a selection of rows of another order than its files: save dataset.flatten_indices() instead"
        )
    files = state.get("_data_files")
    if not isinstance(files, list) or not files:
        raise ValueError(f"{folder / _STATE} is damaged: _data_files must be a list of files")
    found = []
    for file in files:
        name = file.get("filename") if isinstance(file, dict) else None
        plain = isinstance(name, str) and name and not name.startswith(".") and "/" not in name and "\0" not in name
        if not isinstance(name, str) or not plain:
            raise ValueError(f"{folder / _STATE} names {str(name)[:200]!r}, which is no file of its folder: refused")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist, but {folder / _STATE} lists it")
        found.append(folder / name)
    return found


def _cached(folder: Path) -> list[Path] | None:
    """Return the files of a cache, in which others, of `map` and the like, may lie too."""
    splits = _read(folder / _INFO).get("splits")
    of_split: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for path in folder.iterdir():
        match = _SHARD.fullmatch(path.name)
        split = match[1].rpartition("-")[2] if match else ""
        if match and isinstance(splits, dict) and split in splits and "-" in match[1]:
            of_split.setdefault(match[1], {})[int(match[2] or 0)] = path
            counts[match[1]] = int(match[3] or 1)
    if not of_split:
        return None
    if len(of_split) > 1:
        names = ", ".join(f"{folder / name}*.arrow" for name in sorted(of_split))
        raise ValueError(f"{folder} holds several splits: name one of them: {names}")
    ((name, files),) = of_split.items()
    for number in range(counts[name]):
        if number not in files:
            raise FileNotFoundError(f"{folder}: file {number} of the {counts[name]} of {name} is missing")
    return [files[number] for number in range(counts[name])]


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected at most {_MAX_JSON_BYTES}")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: expected an object")
    return found
