"""Fit shards named again and again, in a process of its own, and print seconds, peak of memory, rows and error.

The error is that of the mean, against the mean of the shards read once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

from realign_fast import fit
from realign_fast.alignment import gather_moments


class Memory:
    """The resident memory of this process, looked at all the while."""

    def __init__(self) -> None:
        self._samples: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._done.wait(0.02):
            self._samples.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        """The most that was seen."""
        return max(self._samples)


if __name__ == "__main__":
    repeats, image, *text = sys.argv[1:]
    once = gather_moments(text)
    with Memory() as memory:
        begin = time.perf_counter()
        alignment = fit(text * int(repeats), image)
        seconds = time.perf_counter() - begin
    found = {"seconds": seconds, "peak_bytes": memory.peak_bytes, "count": alignment.source.count}
    print(json.dumps(found | {"error": float(np.abs(alignment.source.mean - once.mean).max())}))
