"""What the commands cannot do without: a start of Python with NumPy, reading the bytes, writing as many.

Nothing is computed; files are dealt out to two threads, in blocks that stay in a cache.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

BLOCK_BYTES = 2 << 20


def move(source: Path, target: Path | None) -> None:
    block = memoryview(np.empty(BLOCK_BYTES, np.uint8))
    reader = os.open(source, os.O_RDONLY)
    writer = None if target is None else os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    while count := os.readv(reader, [block]):
        if writer is not None:
            os.write(writer, block[:count])
    os.close(reader)
    if writer is not None:
        os.close(writer)


def main(text: Path, image: Path, out: Path | None) -> None:
    """Read as fit does, text twice and images once; or, given `out`, read the text and write it there."""
    with ThreadPoolExecutor(2) as pool:
        if out is None:
            for folder in (image, text, text):
                list(pool.map(lambda path: move(path, None), folder.iterdir()))
        else:
            out.mkdir()
            list(pool.map(lambda path: move(path, out / path.name), text.iterdir()))


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    main(paths[0], paths[1], paths[2] if len(paths) > 2 else None)
