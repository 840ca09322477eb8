"""A look at rows on their way through a loader: whether they still come from what the alignment was fitted on."""

from __future__ import annotations

import warnings
from threading import Lock
from typing import Any

from ._dtypes import Rows
from ._rows import as_rows
from .alignment import Alignment, DriftWarning
from .moments import Moments

# Wide enough that the noise floor is a small part of any gap, and looked at in a few milliseconds.
DEFAULT_ROWS = 8192
# After the first window one row of so many is looked at, of twice as many in each window after that.
_FIRST_STRIDE = 128


class DriftWatch:
    """Looks at windows of rows, and warns once, where the mean of one lies too far from that of the fit.

    The first window is the first rows that come. Each of those after it is spread over a longer stretch than the one
    before: so the looks cost ever less, whole shards count for little, and the number of windows, any of which might
    raise a false alarm, grows with the logarithm of that of the rows.
    """

    def __init__(self, alignment: Alignment, num_rows: int) -> None:
        if num_rows < 1:
            raise ValueError(f"check_drift must be at least 1 row, got {num_rows}")
        self._alignment, self._num_rows = alignment, num_rows
        self._lock = Lock()
        self._moments, self._looked = Moments(alignment.dim), 0
        self._stride, self._next = 1, 0
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()

    def look(self, x: Any, num_threads: int | None = None) -> None:
        """Look at some of the next rows: `Rows`, or an array or tensor `(n, dim)`."""
        num_rows = len(x.values if isinstance(x, Rows) else x)
        # Never waits: another thread may be looking, or have been where this process was forked.
        if self._warned or not self._lock.acquire(blocking=False):
            return
        try:
            while self._next < num_rows:
                end = min(num_rows, self._next + (self._num_rows - self._looked) * self._stride)
                part = slice(self._next, end, self._stride)
                some = Rows(x.values[part], x.dtype) if isinstance(x, Rows) else as_rows(x[part], dim=self._moments.dim)
                self._moments.update_rows(some, "skip", num_threads)
                self._looked += len(some.values)
                self._next += len(some.values) * self._stride
                if self._looked == self._num_rows:
                    self._judge()
            self._next -= num_rows
        finally:
            self._lock.release()

    def _judge(self) -> None:
        moments, self._moments, self._looked = self._moments, Moments(self._alignment.dim), 0
        self._stride = max(_FIRST_STRIDE, 2 * self._stride)
        if moments.count == 0:
            return
        drift = self._alignment.check(moments)
        if drift.drifted and not self._warned:
            self._warned = True
            warnings.warn(
                f"the stream has left what its alignment was fitted on: the mean of {drift.num_rows} rows lies "
                f"{drift.distance:.3g} from that of the fit, {drift.distance / drift.noise_floor:.1f} times the noise "
                f"floor {drift.noise_floor:.2g}, and 3 times would be the most that chance explains. Are these rows of "
                "the same encoder, and not aligned yet? If the data have changed, fit again; if rows come in order of "
                "their sources, shuffle them or check more rows at a time (check_drift=)",
                DriftWarning,
                stacklevel=2,
            )


def watch_for(alignment: Alignment | None, check_drift: bool | int) -> DriftWatch | None:
    """Return what watches for a loader with this argument.

    ValueError where there is no alignment to drift from, or a number of rows less than 1.
    """
    if check_drift is False:
        return None
    if alignment is None:
        raise ValueError("check_drift needs an alignment: it is measured from what that was fitted on")
    return DriftWatch(alignment, DEFAULT_ROWS if check_drift is True else check_drift)
