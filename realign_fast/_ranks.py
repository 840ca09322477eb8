"""The processes of one job, as torchrun starts them: who reads which files, and how they speak with each other.

torch is imported only where there is more than one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from ._stop import EXIT_CODE, Stopped, ignore
from .backends import count_threads
from .moments import Moments

T = TypeVar("T")

# Processes wait for the slowest. One that has died is known by its closed connection, not by a clock.
_TIMEOUT = timedelta(days=30)
_ERRORS = "realign/errors"
_STOPPED = "realign/stopped"


class LostRankError(ConnectionError):
    """Another process of the job has ended before its work was done."""

    def __init__(self) -> None:
        super().__init__("another process of this job has ended: start the job again (it goes on with --resume)")


class Ranks:
    """One process alone; the methods give what several would agree on.

    Attributes
    ----------
    rank, size : int
        The number of this process, and how many there are.
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that decides, writes and speaks for all."""
        return self.rank == 0

    @property
    def label(self) -> str:
        """What progress is that of this process alone, in words; empty where there is no other."""
        return "" if self.size == 1 else f", share {self.rank + 1} of {self.size}"

    def gather(self, value: T) -> list[T]:
        """Return, in every process, the values of all."""
        return [value]

    def collect(self, value: T) -> list[T]:
        """Return the values of all in the first process, in the others nothing: for large ones."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Return the value of the first process in all."""
        return value

    def total(self, moments: Moments) -> Moments:
        """Return, in every process, the moments of all rows."""
        return moments

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Return the numbers of the files that this process is to read, in order; `sizes` are those of all, in bytes.

        Raises
        ------
        ValueError
            If the processes do not see the same files.
        """
        return list(range(len(sizes)))

    def threads(self, num_threads: int | None) -> int | None:
        """Return how many threads to use where `num_threads` were asked for, None where nothing was."""
        return num_threads


ALONE = Ranks()


class _TorchRanks(Ranks):
    """The processes that torchrun has started, through torch.distributed and gloo."""

    def __init__(self) -> None:
        import torch
        from torch import distributed
        from torch.distributed.rendezvous import rendezvous

        self._distributed = distributed
        try:
            self._store, self.rank, self.size = next(rendezvous("env://", timeout=_TIMEOUT))
            distributed.init_process_group(
                "gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=_TIMEOUT
            )
        except RuntimeError as error:
            raise ConnectionError(f"the processes of this job cannot meet: {error}") from None
        here = os.environ.get("GROUP_RANK", "")
        found = self.gather((here, os.getpid()))
        # Those of one launcher see each other.
        self._neighbours = [(rank, pid) for rank, (where, pid) in enumerate(found) if where == here]
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with _lost():
            self._distributed.all_gather_object(found, value)
        return found

    def collect(self, value: T) -> list[T]:
        # One after the other: a gather would give all of them the room of the largest.
        with _lost():
            if not self.first:
                self._distributed.send_object_list([value], dst=0)
                return []
            found = [value]
            for rank in range(1, self.size):
                box: list[Any] = [None]
                self._distributed.recv_object_list(box, src=rank)
                found += box
        return found

    def broadcast(self, value: T) -> T:
        box = [value]
        with _lost():
            self._distributed.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, moments: Moments) -> Moments:
        from .distributed import all_reduce

        with _lost():
            return all_reduce(moments)

    def share(self, sizes: Sequence[int]) -> list[int]:
        if any(seen != list(sizes) for seen in self.gather(list(sizes))):
            raise ValueError("the processes of this job do not see the same files: all must read one file system")
        # The largest first, each to whom has the least: the same in every process.
        loads = [0] * self.size
        mine = []
        for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
            rank = loads.index(min(loads))
            loads[rank] += max(1, sizes[number])
            if rank == self.rank:
                mine.append(number)
        return sorted(mine)

    def threads(self, num_threads: int | None) -> int | None:
        if num_threads is not None:
            return num_threads
        return max(1, count_threads(None) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def announce(self) -> bool:
        """Say that this process fails; return whether it is the first to, and so the one that says why."""
        try:
            return bool(self._store.add(_ERRORS, 1) == 1)
        except RuntimeError:  # who kept the store is gone too
            return True

    def lost(self) -> bool:
        """Return whether this process was asked to end because another has, and not by who started the job.

        torchrun sends the same signal for both. But who is asked to end leaves word before it does, so that a process
        of this machine that is gone without a word is the reason. Of other machines nothing is known.
        """
        try:
            self._store.set(f"{_STOPPED}/{self.rank}", "")
            return any(
                _is_gone(pid) and not self._store.check([f"{_STOPPED}/{rank}"]) for rank, pid in self._neighbours
            )
        except RuntimeError:  # who kept the store is gone too
            return True

    def leave(self) -> None:
        """End together with the others."""
        self.gather(None)
        self._distributed.destroy_process_group()


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # all that torch.distributed raises where a connection closes
        raise LostRankError from None


def _under_torchrun() -> bool:
    found = os.environ
    started = "RANK" in found and ("TORCHELASTIC_RUN_ID" in found or "LOCAL_RANK" in found)
    return started and int(found.get("WORLD_SIZE", "1")) > 1


@contextmanager
def connected() -> Iterator[Ranks]:
    """Meet the other processes where torchrun has started some, for as long as the block lasts.

    An error in one of them ends the job: the first that fails raises what it met; the others end with
    `SystemExit(1)`, since that one has said why.
    """
    if not _under_torchrun():
        yield ALONE
        return
    ranks = _TorchRanks()
    try:
        yield ranks
        ranks.leave()
    except (Exception, KeyboardInterrupt, Stopped) as error:
        ignore()  # torchrun asks all others to end when one has
        stopped = isinstance(error, Stopped)
        if stopped and ranks.lost():
            error, stopped = LostRankError(), False
        if not ranks.announce():
            raise SystemExit(EXIT_CODE if stopped else 1) from None
        raise error from None
