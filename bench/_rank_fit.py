"""Fit in as many processes as torchrun starts; the first prints the seconds, without those of starting and opening."""

from __future__ import annotations

import sys
import time

from realign_fast._ranks import connected
from realign_fast.alignment import fit

if __name__ == "__main__":
    threads, repeats, image, *text = sys.argv[1:]
    with connected() as ranks:
        options = {"num_threads": int(threads), "ranks": ranks}
        fit(text[:1], image, **options)  # what is imported and made once
        ranks.gather(None)
        begin = time.perf_counter()
        fit(text * int(repeats), image, **options)
        seconds = time.perf_counter() - begin
        if ranks.first:
            print(seconds)
