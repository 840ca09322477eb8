"""The files of the package: safetensors with one JSON header entry, as FORMATS.md specifies them.

Equal contents give equal bytes, and a file states the oldest version of the format that can hold it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._os import sync_directory
from ._version import __version__

FORMAT_VERSION = 2
_KEY = "realign_fast"
# In the order in which the safetensors package puts tensors: each begins where its elements may.
_CODES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "uint16": "U16",
    "uint8": "U8",
}
# A dimension of a million in float64 is 40 MB; whatever is larger than this was never written by us.
MAX_FILE_BYTES = 1 << 30


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either what it held before or all of it."""
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write a file to; after the block it is at `path`, and after an error nowhere."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        with temporary.open("r+b") as file:  # Windows syncs only what can be written
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error  # of a full disk the name is not known
        raise
    sync_directory(path.parent)


def save(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, NDArray[Any]],
    fields: Mapping[str, Any],
    *,
    version: int = 1,
    max_bytes: int | None = MAX_FILE_BYTES,
) -> None:
    """Write a file of `kind`, whole or not at all; `version` is the oldest of the format that can hold it."""
    header: dict[str, Any] = {"format": version, "kind": kind, "package": __version__, **fields}
    entries: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(header, allow_nan=False)}}
    order = list(_CODES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype.name), name))
    end = 0
    for name in names:
        array = tensors[name]
        begin, end = end, end + array.nbytes
        entries[name] = {"dtype": _CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + end
    if max_bytes is not None and size > max_bytes:
        raise ValueError(f"{path} would have {size} bytes, more than the {max_bytes} that are read again")
    with replacing(Path(path)) as temporary, temporary.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:  # one after the other: together, as bytes, they would be in memory twice
            array = np.ascontiguousarray(tensors[name])
            file.write((array.byteswap() if sys.byteorder == "big" else array).reshape(-1).view(np.uint8).data)


def load(
    path: str | os.PathLike[str],
    kind: str,
    shapes: Mapping[str, tuple[np.dtype[Any], int]],
    *,
    optional: Mapping[str, tuple[np.dtype[Any], int]] = MappingProxyType({}),
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read a file of `kind`; `shapes` gives dtype and number of axes of each tensor it must hold, and may hold.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is damaged, of another kind, or of a format version newer than this package.
    """
    tensors, fields = load_all(path, kind)
    for name, (dtype, ndim) in (*shapes.items(), *optional.items()):
        found = tensors.get(name)
        if found is None:
            if name in optional:
                continue
            raise ValueError(f"{path}: tensor {name!r} is missing")
        if found.dtype != dtype or found.ndim != ndim:
            raise ValueError(
                f"{path}: tensor {name!r} must be {dtype} with {ndim} axes, got {found.dtype} of shape {found.shape}"
            )
        if not np.isfinite(found).all():
            raise ValueError(f"{path}: tensor {name!r} holds values that are not finite")
    return tensors, fields


def load_all(
    path: str | os.PathLike[str], kind: str, max_bytes: int = MAX_FILE_BYTES
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read a file of `kind` with whatever tensors it holds, of which nothing is checked; raises as `load`."""
    tensors, fields = _read(path, max_bytes)
    if fields.get("kind") != kind:
        raise ValueError(f"{path} holds {fields.get('kind')!r}, expected {kind!r}")
    return tensors, fields


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Return which kind of file of ours `path` is, such as "alignment" or "moments", None for any other file.

    Raises
    ------
    ValueError
        If it is one of ours, but its header is damaged or of a format version newer than this package.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            ours = _KEY in (file.metadata() or {})
    except SafetensorError:
        return None
    return str(_read(path)[1].get("kind")) if ours else None


def _read(
    path: str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    size = Path(path).stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes, more than a file of ours can have")
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            fields = header_of(path, file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, fields  # noqa: SIM118 (not a mapping)
    except (SafetensorError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def header_of(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the JSON object in the metadata of a file of ours; ValueError as `kind_of`, and for any other file."""
    if _KEY not in metadata:
        raise ValueError(f"{path} was not written by realign-fast: its header has no {_KEY!r}")
    try:
        fields = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(fields, dict) or type(fields.get("format")) is not int or fields["format"] < 1:
        raise ValueError(f"{path}: header entry {_KEY!r} does not state its format")
    if fields["format"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {fields['format']}, newer than the {FORMAT_VERSION} that this package reads: "
            "upgrade realign-fast"
        )
    return fields
