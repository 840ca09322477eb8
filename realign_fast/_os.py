"""What not every system has, and what stands in for it elsewhere."""

from __future__ import annotations

import os
import threading
from pathlib import Path

# Windows would change line ends without it.
O_BINARY: int = getattr(os, "O_BINARY", 0)
# To open what may be no plain file: neither follow a link nor wait for a pipe.
O_PLAIN: int = O_BINARY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

_seeking = threading.Lock()


def pread(fd: int, size: int, offset: int) -> bytes:
    """Return up to `size` bytes of an open file from byte `offset` on, fewer only at its end."""
    if hasattr(os, "pread"):
        return os.pread(fd, size, offset)
    with _seeking:  # threads share the position
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)


def advise(fd: int, offset: int, size: int, advice: str) -> None:
    """Say of part of an open file what will become of it, "SEQUENTIAL" or "WILLNEED", where that can be said."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, getattr(os, f"POSIX_FADV_{advice}"))


def memory_bytes() -> int | None:
    """Return how much memory the machine has, where the system says."""
    names = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"}
    if not names <= set(getattr(os, "sysconf_names", ())):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk, where a directory can be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
