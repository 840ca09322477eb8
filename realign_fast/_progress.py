"""Lines on stderr, and progress there: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """Write a line to stderr, in one go: `print` gives its end apart, and lines of several processes run together."""
    sys.stderr.write(f"{text}\n")


@contextmanager
def progress(
    description: str, total: int | None, initial: int = 0, *, enabled: bool = True, unit: str = "rows"
) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many more rows (or whatever `unit` names) are done.

    `initial` of them were done before: they count towards the total, but not into the rate.
    """
    if not enabled:
        yield lambda _: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        options = {"unit": f" {unit}", "unit_scale": True, "file": sys.stderr}
        with tqdm(total=total, initial=initial, desc=description, **options) as bar:
            yield lambda count: bar.update(count) and None
    else:
        yield _Lines(description, total, unit, initial)


class _Lines:
    def __init__(self, description: str, total: int | None, unit: str, initial: int) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._initial = self._done = initial
        self._start = self._last = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._done != self._total and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = (self._done - self._initial) / max(now - self._start, 1e-9)
        of = "" if self._total is None else f" of {self._total:,}"
        left = "" if self._total is None or not rate else f", {max(0, self._total - self._done) / rate:.0f} s left"
        unit = self._unit
        say(f"{self._description}: {self._done:,}{of} {unit}, {rate:,.{0 if rate >= 10 else 1}f} {unit}/s{left}")
