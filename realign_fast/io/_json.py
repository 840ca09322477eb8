"""Objects of JSON arrays and JSONL files by number, each read where it lies: only the places are in memory."""

from __future__ import annotations

import json
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .._os import pread

_CHUNK = 1 << 20  # characters read at a time
# What has not ended by then is damaged, so that one missing brace does not bring the rest of a file into memory.
_MAX_OBJECT = 1 << 26
_DECODER = json.JSONDecoder()
_SPACE = re.compile("[\ufeff \t\r\n]*")


class JsonObjects:
    """Objects by number, through all files, once `scan` has found them.

    A file that begins with `[` is an array of objects, another holds one after the other, as a rule one a line.

    Parameters
    ----------
    paths
        The files.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._states: list[tuple[int, int]] = []
        self._starts: list[int] = []  # the number of the first object of each file
        self._places = array("q")  # first byte and end of each object

    def scan(self) -> Iterator[dict[str, Any]]:
        """Yield all objects in order, each of which can be had by number from then on.

        Raises
        ------
        OSError
            If a file cannot be read.
        ValueError
            If one is damaged, cut short or no UTF-8, or an element is no object or nested too deep; it names file,
            number of the object in it, and byte.
        """
        for path in self.paths:
            self._starts.append(len(self))
            with open(path, encoding="utf-8", newline="") as file:
                self._states.append(_state(file))
                for begin, end, value in _objects_of(file):
                    self._places.extend((begin, end))
                    yield value

    def place(self, number: int) -> str:
        """Return where an object lies: file, number in it, and byte."""
        file = self._file(number)
        return f"{self.paths[file]} record {number - self._starts[file]} at byte {self._places[2 * number]}"

    def _file(self, number: int) -> int:
        return bisect_right(self._starts, number) - 1

    def __len__(self) -> int:
        return len(self._places) // 2

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Read and decode an object; ValueError if its file has changed since."""
        begin, end = self._places[2 * number : 2 * number + 2]
        path, state = self.paths[self._file(number)], self._states[self._file(number)]
        with open(path, "rb", buffering=0) as file:
            if _state(file) != state:
                raise ValueError(f"{path} has changed since it was read first")
            value: dict[str, Any] = json.loads(pread(file.fileno(), end - begin, begin))
        return value


def _state(file: IO[Any]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _objects_of(file: IO[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield first byte, end and value of each object of a file."""
    text = _Text(file)
    in_array = text.take("[")
    while not text.take("]" if in_array else ""):
        if in_array and text.number and not text.take(","):
            raise text.error("expected ',' or ']'")
        yield text.take_object()
    if not text.take(""):
        raise text.error("expected nothing behind the array")


class _Text:
    """The text of a file and a place in it; only what lies around that place is in memory."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._text, self._at = file, "", 0
        self._byte, self.number = 0, 0  # of the place, and of the next object

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self._file.name} record {self.number} at byte {self._byte}: {problem}")

    def _read(self, size: int) -> bool:
        try:
            more = self._file.read(size)
        except UnicodeDecodeError as error:
            raise self.error(f"what follows is no UTF-8: {error.reason}") from None
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _go(self, end: int) -> None:
        self._byte, self._at = self._byte + len(self._text[self._at : end].encode()), end

    def _next(self) -> str:
        """Go to the next character that is no white space and return it, "" at the end."""
        while True:
            self._go(_SPACE.match(self._text, self._at).end())  # type: ignore[union-attr]  # it always matches
            if self._at < len(self._text) or not self._read(_CHUNK):
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> bool:
        """Go on behind the next character, or the end where it is "", if it is this one."""
        if self._next() != character:
            return False
        self._go(self._at + len(character))
        return True

    def take_object(self) -> tuple[int, int, dict[str, Any]]:
        """Go on behind the next object."""
        if (found := self._next()) != "{":
            raise self.error(f"expected an object, got {found!r}")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                break
            except RecursionError:
                raise self.error("nested too deep") from None
            except ValueError as error:
                pending = len(self._text) - self._at
                if pending > _MAX_OBJECT or not self._read(max(_CHUNK, pending)):
                    raise self.error(f"damaged or cut short: {getattr(error, 'msg', error)}") from None
        begin = self._byte
        self._go(end)
        self.number += 1
        return begin, self._byte, value
