"""What an output folder says of itself: `realign-manifest.json`, and the journal that grows beside it during a job.

Manifest, format version 1: `format`, `package` (the version that wrote it), `job` (what was asked for), `inputs` (name
and fingerprint of each, in order) and `files`, one entry an output in the same order: `name`, `input`, `rows`, `dim`,
`dtype`, `column`, `size`, `xxh64`, `bad_rows`, `sidecar` (name, size and xxh64 of a second file, or null), and `ids`,
of the input's ids in their order (their column in the output, or its sidecar, and hashes, see `_id_order`; null where
it has none, absent where an older version wrote it). Of embeddings made here, `job` names the `encoder`, an input is a
range of texts or images, `bad_rows` counts those that were left out, and `left_out` says which and why.

The journal holds one JSON object a line: first the manifest's head without `files` and with `former` (the files of an
overwritten job; what is not replaced goes when this one ends), then one entry for each finished file. It becomes the
manifest at the end. A file is in its place before its line is written, so that a line vouches for a file; a torn last
line is ignored. Of several processes at one job the first keeps that journal and each other one its own,
`.realign-journal-RANK`, which begins with the same head: a file system need not let two append to one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .._files import write_atomically
from .._os import O_BINARY
from .._version import __version__
from .sources import MANIFEST

FORMAT_VERSION = 1
JOURNAL = ".realign-journal"
_PART = re.compile(re.escape(JOURNAL) + "-[0-9]+")
_MAX_BYTES = 1 << 30
_TEMPORARY = re.compile(r"\.(.+)\.(?:tmp-[0-9a-f]{8}|[0-9a-f]{8}\.tmp)")
# Of a remote input, which keeps its suffix.
_COPY = re.compile(r"\.copy-[0-9a-f]{8}-.+")
_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "input": (str,),
    "rows": (int,),
    "dim": (int,),
    "dtype": (str,),
    "column": (str, type(None)),
    "size": (int,),
    "xxh64": (str,),
    "bad_rows": (int,),
    "sidecar": (dict, type(None)),
    "ids": (dict, type(None)),
}
_SIDECAR_FIELDS: dict[str, tuple[type, ...]] = {"name": (str,), "size": (int,), "xxh64": (str,)}
_IDS_FIELDS: dict[str, tuple[type, ...]] = {"column": (str,), "xxh64": (list,)}

Entry = dict[str, Any]


class Manifest:
    """The state of an output folder.

    Attributes
    ----------
    head : dict
        Everything but the files.
    files : dict
        Entries of finished files by the name of their input.
    finished : bool
        False while there is a journal.
    """

    def __init__(self, head: dict[str, Any], files: dict[str, Entry], *, finished: bool) -> None:
        self.head = head
        self.files = files
        self.finished = finished

    def names(self) -> set[str]:
        """Return the names of all files that it lists, those of a job it replaces among them."""
        return names_of(self.files.values()) | set(self.head.get("former", []))


def outputs_of(entry: Entry) -> list[dict[str, Any]]:
    """Return what states name, size and xxh64: the entry, and its sidecar where it has one."""
    return [entry] if entry["sidecar"] is None else [entry, entry["sidecar"]]


def names_of(entries: Iterable[Entry]) -> set[str]:
    """Return the names of all files in `entries`."""
    return {output["name"] for entry in entries for output in outputs_of(entry)}


def new_head(job: dict[str, Any], inputs: list[dict[str, str]]) -> dict[str, Any]:
    """Return the head of a manifest for a job."""
    return {"format": FORMAT_VERSION, "package": __version__, "job": job, "inputs": inputs}


def check_same_job(where: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError, naming the first of them, where options differ."""
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise ValueError(f"{where} holds another job: {key} was {before.get(key)!r}, now it is {now.get(key)!r}")


def load(folder: Path) -> Manifest | None:
    """Read the journal of `folder`, or else its manifest; None where there is neither.

    Raises
    ------
    ValueError
        If it is damaged, from a newer version, or names a file outside the folder.
    """
    for name, finished in ((JOURNAL, False), (MANIFEST, True)):
        path = folder / name
        if not path.exists() and not path.is_symlink():
            continue
        manifest = _read(path, finished)
        if not finished:
            for part in journal_parts(folder):
                other = _read(part, finished)
                if other.head == manifest.head:  # else a job before this one has left it
                    manifest.files |= other.files
        return manifest
    return None


def encoder_in(folder: Path) -> str | None:
    """Return which encoder made the embeddings in `folder`, None where no manifest says it; raises as `load`."""
    manifest = load(folder)
    name = manifest and manifest.head["job"].get("encoder")
    return name if isinstance(name, str) else None


def journal_parts(folder: Path) -> list[Path]:
    """Return the journals of all processes but the first."""
    return sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name))


def _read(path: Path, finished: bool) -> Manifest:
    if path.is_symlink():
        raise ValueError(f"{path} is a link, expected a file")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any manifest has")
    head, entries = _split(path, path.read_bytes(), finished)
    _check_head(path, head)
    files = {}
    for entry in entries:
        check_entry(path, entry)
        files[entry["input"]] = entry
    return Manifest(head, files, finished=finished)


def _split(path: Path, text: bytes, finished: bool) -> tuple[Any, list[Any]]:
    try:
        if finished:
            head = json.loads(text)
            entries = head.pop("files")
            if not isinstance(entries, list):
                _damaged(path, "files must be a list")
            return head, entries
        lines = text.split(b"\n")[:-1]  # what follows the last line end was torn off
        return json.loads(lines[0]), [json.loads(line) for line in lines[1:]]
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError, IndexError) as error:
        _damaged(path, f"{error}")


def _check_head(path: Path, head: Any) -> None:
    if not isinstance(head, dict) or type(head.get("format")) is not int:
        _damaged(path, "it does not state its format")
    if head["format"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {head['format']}, this package reads up to {FORMAT_VERSION}: "
            "upgrade realign-fast"
        )
    inputs, former = head.get("inputs"), head.get("former", [])
    if not isinstance(head.get("job"), dict) or not isinstance(inputs, list) or not isinstance(former, list):
        _damaged(path, "it does not state its job and inputs")
    for item in inputs:
        if not isinstance(item, dict) or not all(type(item.get(key)) is str for key in ("name", "fingerprint")):
            _damaged(path, "an input has no name or fingerprint")
    for name in former:
        check_name(path, name)


def check_entry(path: Path, entry: Any) -> None:
    """Raise ValueError unless `entry` has all fields and names files inside the folder of `path`."""
    _check_fields(path, entry, _FIELDS)
    check_name(path, entry["name"])
    if entry["sidecar"] is not None:
        _check_fields(path, entry["sidecar"], _SIDECAR_FIELDS)
        check_name(path, entry["sidecar"]["name"])
    if entry.get("ids") is not None:
        _check_fields(path, entry["ids"], _IDS_FIELDS)


def _check_fields(path: Path, value: Any, fields: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(value, dict):
        _damaged(path, "a file's entry is no object")
    for field, types in fields.items():
        if type(value.get(field)) not in types:
            _damaged(path, f"{field!r} of a file is {str(value.get(field))[:40]!r}")


def check_name(path: Path, name: Any) -> None:
    """Raise ValueError unless `name` is that of a visible plain file in the folder of `path`."""
    plain = isinstance(name, str) and name and not name.startswith(".") and "/" not in name and "\0" not in name
    if not plain or name == MANIFEST:
        raise ValueError(f"{path} names {str(name)[:200]!r}, which is no file of its folder: refused")
    if (path.parent / name).is_symlink():
        raise ValueError(f"{path} names {name!r}, which is a link: refused")


def _damaged(path: Path, what: str) -> NoReturn:
    raise ValueError(f"{path} is damaged: {what}")


class Start(NamedTuple):
    """Of a job: the manifest's head, entries of what is finished, and the files that an earlier job has left."""

    head: dict[str, Any]
    finished: dict[str, Entry]
    former: set[str]


class Journal:
    """Writes what is finished, and at last the manifest.

    Attributes
    ----------
    start : Start
        With which the journals of all processes of the job begin.
    entries : dict
        Of finished files by the name of their input.
    """

    def __init__(self, folder: Path, start: Start, rank: int = 0) -> None:
        self._folder = folder
        self.start = start
        self.entries = dict(start.finished)
        self._path = folder / (f"{JOURNAL}-{rank}" if rank else JOURNAL)
        lines = [{**start.head, "former": sorted(start.former)}, *(() if rank else self.entries.values())]
        write_atomically(self._path, "".join(_line(line) for line in lines).encode())
        if rank == 0:
            self._remove_parts()  # what they hold is here now
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | O_BINARY)

    def add(self, entry: Entry) -> None:
        """Vouch for one more file."""
        # In one write: the file system does not interleave it with anything. Durability waits for the end: after a
        # power loss a missing line only means that its file is made again.
        data = _line(entry).encode()
        if os.write(self._fd, data) != len(data):
            raise OSError(f"{self._path}: could not be written")
        self.entries[entry["input"]] = entry

    def finish(self) -> None:
        """Remove what is left of an overwritten job and turn the journal into the manifest."""
        for name in self.start.former - names_of(self.entries.values()):
            (self._folder / name).unlink(missing_ok=True)
        files = [self.entries[item["name"]] for item in self.start.head["inputs"]]
        text = json.dumps({**self.start.head, "files": files}, indent=1, sort_keys=True) + "\n"
        write_atomically(self._folder / MANIFEST, text.encode())
        self.close()
        self._path.unlink()
        self._remove_parts()

    def _remove_parts(self) -> None:
        for path in journal_parts(self._folder):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; the journal stays for a resumed run."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True) + "\n"


def is_temporary(name: str) -> bool:
    """Return whether `name` is one under which a killed job leaves a file unfinished."""
    return (_TEMPORARY.fullmatch(name) or _COPY.fullmatch(name)) is not None


def copy_name(name: str) -> str:
    """Return under which name an output folder holds a copy of the remote input `name` for a while."""
    return f".copy-{os.urandom(4).hex()}-{name}"


def remove_temporaries(folder: Path, names: set[str]) -> None:
    """Remove what a killed job left unfinished of the files `names`."""
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        ours = match and (match[1] in names | {MANIFEST, JOURNAL} or _PART.fullmatch(match[1]))
        if ours or _COPY.fullmatch(path.name):
            path.unlink(missing_ok=True)
