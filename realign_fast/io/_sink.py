"""A file on its way: hashed while it is written, under a temporary name until it is whole and on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._native import _C
from .._os import O_BINARY


class Sink:
    """What encoders write to; as much of a file as pyarrow and pickle ask for."""

    closed = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._discarded = False
        self._hasher = _C.XXH64()
        self._temporary = path.with_name(f".{path.name}.tmp-{os.urandom(4).hex()}")
        with self._errors():
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | O_BINARY, 0o666)

    def write(self, data: Any) -> int:
        """Append `data`, any contiguous buffer."""
        view = memoryview(data).cast("B")
        if not view.nbytes or self._discarded:  # pyarrow's writers write their footers when they are forgotten
            return view.nbytes
        self._hasher.update(view)
        done = 0
        with self._errors():
            while done < view.nbytes:
                done += os.write(self._fd, view[done:])
        self.size += done
        return done

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def close(self) -> None:
        """Do nothing: `finish` or `discard` ends it."""

    def finish(self) -> dict[str, Any]:
        """Put the file in its place, durable and whole; return its name, size and hash."""
        with self._errors():
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._temporary.replace(self.path)
        return {"name": self.path.name, "size": self.size, "xxh64": self._hasher.hexdigest()}

    def discard(self) -> None:
        """Remove what is not finished, and take no notice of what is written from now on."""
        self._discarded = True
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a full disk is reported without the name of the file
            raise OSError(error.errno, error.strerror, str(self.path)) from error
