"""What tells whether a file is still the one that was read, without reading all of it."""

from __future__ import annotations

import os
from pathlib import Path

from .. import _C

_BLOCK_BYTES = 4096
_NUM_BLOCKS = 64
_END_BYTES = 1 << 16  # formats keep their headers at one of the ends


def state_of(path: Path) -> list[int]:
    """Return what changes when a file does: its size and time of change."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def fingerprint(path: Path) -> str:
    """Return a hash, 16 hex digits, of the size, the time of change, both ends and 64 blocks of a file."""
    hasher = _C.XXH64()
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        hasher.update(f"{size} {status.st_mtime_ns}".encode())
        last = max(0, size - _BLOCK_BYTES)
        blocks = [(last * i // (_NUM_BLOCKS - 1), _BLOCK_BYTES) for i in range(_NUM_BLOCKS)]
        for offset, length in ((0, _END_BYTES), *blocks, (max(0, size - _END_BYTES), _END_BYTES)):
            hasher.update(os.pread(file.fileno(), length, offset))
    return hasher.hexdigest()


def combined(fingerprints: list[str]) -> str:
    """Return one fingerprint for a sequence of files."""
    hasher = _C.XXH64()
    for item in fingerprints:
        hasher.update(item.encode())
    return hasher.hexdigest()
