"""What tells whether a file is still the one that was read, without reading all of it."""

from __future__ import annotations

import os

from .._native import _C
from .._os import pread
from ._remote import AnyPath, RemotePath

_BLOCK_BYTES = 4096
_NUM_BLOCKS = 64
_END_BYTES = 1 << 16  # formats keep their headers at one of the ends


def fingerprint(path: AnyPath) -> str:
    """Return a hash, 16 hex digits, of the size, the time of change, both ends and 64 blocks of a file.

    Of a remote one: of its size and what its store says of its version, or else of both ends.
    """
    hasher = _C.XXH64()
    if isinstance(path, RemotePath):
        hasher.update(f"{path.size} {path.version}".encode())
        if path.version is None:
            for begin in (0, max(0, path.size - _END_BYTES)):
                hasher.update(path.fetch(begin, min(path.size, begin + _END_BYTES)))
        return hasher.hexdigest()
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        hasher.update(f"{size} {status.st_mtime_ns}".encode())
        last = max(0, size - _BLOCK_BYTES)
        blocks = [(last * i // (_NUM_BLOCKS - 1), _BLOCK_BYTES) for i in range(_NUM_BLOCKS)]
        for offset, length in ((0, _END_BYTES), *blocks, (max(0, size - _END_BYTES), _END_BYTES)):
            hasher.update(pread(file.fileno(), length, offset))
    return hasher.hexdigest()


def combined(fingerprints: list[str]) -> str:
    """Return one fingerprint for a sequence of files."""
    hasher = _C.XXH64()
    for item in fingerprints:
        hasher.update(item.encode())
    return hasher.hexdigest()
