"""SIGTERM: a job that is asked to end leaves what the next run can go on from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM


class Stopped(BaseException):  # as KeyboardInterrupt: what handles errors must not take it for one
    """The process was asked to end.

    Attributes
    ----------
    kept : str
        What is left of its work and how to go on, if anything is.
    """

    kept = ""

    def __str__(self) -> str:
        return "stopped by SIGTERM: " + (self.kept or "start it again")


# Of the process, as signals are: how many blocks hold it back, and whether it has come.
_num_holding = 0
_asked = False


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` in the block where SIGTERM comes; in another than the main thread, do nothing."""
    global _asked, _num_holding
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked, _num_holding = False, 0
    before = signal.signal(signal.SIGTERM, _ask)
    try:
        yield
    finally:
        _asked = True  # it ends already
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        _asked = False


def _ask(*_: object) -> None:
    global _asked
    if _asked:
        return
    _asked = True
    if not _num_holding:
        raise Stopped


def ignore() -> None:
    """Let SIGTERM go unheard from now on: the process ends already."""
    global _asked
    _asked = True


@contextmanager
def holding() -> Iterator[None]:
    """Keep `Stopped` until the block is done: what it changes is changed as a whole. For the main thread."""
    global _num_holding
    _num_holding += 1
    try:
        yield
    finally:
        _num_holding -= 1
    if _asked and not _num_holding:
        raise Stopped
