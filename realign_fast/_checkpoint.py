"""What a fit has read so far, in a file beside its output: a killed one goes on where it ended.

Files of kind "partial" (see `_files`), format version 1: `.NAME.partial` of the first process, `.NAME.partial-RANK` of
each other. Fields: `token`, drawn anew whenever the files are divided between processes, so that only parts of one
division count; `number`, how many reads are finished, and `read`, the one under way, or null; and in the file of the
first process, which decides, `job`, `inputs`, `size` (how many processes there are), `finished` (the reads that are)
and `map` (a hash of the map of the read under way). Of a read: `moments` and `sample`, the fields of each, `map`, and
the tensors `PREFIX.sums` ..., `PREFIX.keys` and `.rows`, and `.files`, `.done` and `.whole`: how many rows of which
files are in it. `base.files` ...: what was in it when the files were divided.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _files
from ._native import _C
from ._progress import say
from ._ranks import LostRankError, Ranks
from ._sample import Sample
from ._stop import Stopped, holding
from .io._manifest import check_same_job
from .io.sources import Done, Source
from .methods import Parameters
from .moments import MappedMoments, Moments

# Seconds from one write to the next; more where a write takes long, of which none may cost more than 1 / _PATIENCE.
INTERVAL = 30.0
_PATIENCE = 50
_MAX_BYTES = 16 << 30

Tensors = dict[str, NDArray[Any]]


def nothing_done() -> Done:
    """Return what is done where nothing is."""
    return Done({}, set())


@dataclass
class Read:
    """One read of a set, as far as this process has come.

    Attributes
    ----------
    moments, sample
        Of the rows that are in it.
    map : str
        A hash of the map whose moments these are, if any.
    done : Done
        Which rows are in it, and which others of the files have none to come either.
    """

    moments: Moments
    sample: Sample | None = None
    map: str = ""
    done: Done = field(default_factory=nothing_done)

    def merge(self, other: Read) -> None:
        """Add what another process has read."""
        self.moments.merge(other.moments)
        if self.sample is not None and other.sample is not None:
            self.sample.merge(other.sample)
        for number, count in other.done.rows.items():
            self.done.rows[number] = max(count, self.done.rows.get(number, 0))
        self.done.whole.update(other.done.whole)


def hash_of(parameters: Parameters) -> str:
    """Return a hash of a map."""
    hasher = _C.XXH64()
    step = parameters.affine
    arrays = [np.array([parameters.scale]), parameters.shift, parameters.correction]
    for array in arrays + ([] if step is None else [step.matrix, step.centre, step.offset]):
        hasher.update(np.ascontiguousarray(array).data)
    return str(hasher.hexdigest())


def path_beside(output: str | os.PathLike[str]) -> Path:
    """Return where the first process keeps what it has read for a fit that writes `output`."""
    path = Path(output)
    return path.with_name(f".{path.name}.partial")


class Checkpoint:
    """The finished reads of a job and the one under way, kept now and then.

    Parameters
    ----------
    output
        What the job will write.
    job
        All that decides it beside the inputs: plain JSON values.
    sources
        What the job reads, by name.
    ranks
        The processes that divide the files between them: all make one of these alike.
    resume
        Go on with what is there.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        job: Mapping[str, Any],
        sources: Mapping[str, Source],
        ranks: Ranks,
        *,
        resume: bool,
    ) -> None:
        self._first_path = path_beside(output)
        self._path = self._first_path
        if not ranks.first:
            self._path = self._path.with_name(f"{self._path.name}-{ranks.rank}")
        self._job = json.loads(json.dumps(dict(job)))
        self._sources = sources
        self._ranks = ranks
        self._resume = resume
        self._enabled = True
        self.number = 0
        self._finished: list[Read] = []
        self._read: Read | None = None
        self._loaded: Read | None = None
        # Of which read the files were divided anew, with which map, and what was done then.
        self._begun = 0, "", nothing_done()
        self._token = ""
        self._written = False
        self._warned = False
        self._due = time.monotonic() + INTERVAL
        in_memory = [name for name, source in sources.items() if not source.in_files]
        if in_memory:
            self.disable(f"{in_memory[0]} lies in memory")

    def disable(self, reason: str) -> None:
        """Keep nothing; ValueError where that was to be resumed."""
        if self._resume:
            raise ValueError(f"resume: {reason}, and such a read is not kept: start it again without")
        self._enabled = False

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Load what there is; write what has been read where the block is stopped, or another process is lost."""
        if not self._enabled:
            yield
            return
        self._open()
        try:
            yield
        except (Stopped, LostRankError) as error:
            kept = self._keep()
            if isinstance(error, Stopped):
                error.kept = kept
            raise

    def _keep(self) -> str:
        # Between two reads, all that are finished; but what was loaded and not yet gone on from lies there already.
        between = self._ranks.first and self._loaded is None and 0 < self.number == len(self._finished)
        if self._read is not None or between:
            try:
                self._write()
            except (OSError, ValueError) as error:
                how = "go on with --resume from what was kept before" if self._written else "start it again"
                return f"what was read could not be kept ({error}), {how}"
        elif not self._written and self.number == 0:
            return "nothing was read yet, start it again"
        return f"what was read is kept in {self._first_path}, go on with --resume"

    # ---- Reads ------------------------------------------------------------------------------------------------------

    def replay(self, of_map: str = "") -> Read | None:
        """Return the next read, in the first process, if it is finished."""
        if self.number >= len(self._finished):
            return None
        found = self._finished[self.number]
        if found.map != of_map:  # another machine has solved for another map
            del self._finished[self.number :]
            self._begun, self._loaded = (self.number, "", nothing_done()), None
            return None
        self.number += 1
        return found

    def done_before(self, of_map: str = "") -> Done:
        """Return what of the next read was done when the files were divided between the processes."""
        number, begun_map, done = self._begun
        return done if (number, begun_map) == (self.number, of_map) else nothing_done()

    def begin(self, read: Read) -> Read:
        """Return `read`, which has no rows yet, or what there is of it."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or (self.number, loaded.map) != (self._begun[0], read.map):
            read.done = self.done_before(read.map).copy()
        else:
            _check_alike(self._path, read, loaded)
            read = loaded
        self._read = read
        return read

    def tick(self) -> None:
        """Write what has been read if it is time to."""
        if not self._enabled or time.monotonic() < self._due:
            return
        began = time.monotonic()
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                say(f"what is read is not kept: {error}")
            self._warned = True
        now = time.monotonic()
        self._due = now + max(INTERVAL, _PATIENCE * (now - began))

    def finish(self, read: Read) -> None:
        """End the read under way, of which all processes together have `read`."""
        with holding():
            self._read = None
            self.number += 1
            if not self._ranks.first:
                return
            self._finished.append(read)
            if self._written:  # the parts of other processes belong to the next read soon
                self._due = time.monotonic()
            self.tick()

    def remove(self) -> None:
        """Remove all files: the job is done."""
        if self._enabled:
            for path in (self._first_path, *self._parts(), *self._temporaries()):
                path.unlink(missing_ok=True)

    # ---- Files ------------------------------------------------------------------------------------------------------

    def _parts(self) -> list[Path]:
        pattern = re.compile(re.escape(self._first_path.name) + "-[0-9]+")
        return sorted(path for path in self._path.parent.iterdir() if pattern.fullmatch(path.name))

    def _temporaries(self) -> list[Path]:
        pattern = re.compile(r"\." + re.escape(self._first_path.name) + r"(-[0-9]+)?\.[0-9a-f]{8}\.tmp")
        return [path for path in self._path.parent.iterdir() if pattern.fullmatch(path.name)]

    def _inputs(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: source.inputs() for name, source in self._sources.items()}
        return found

    def _write(self) -> None:
        fields: dict[str, Any] = {"token": self._token, "number": self.number, "read": None}
        tensors: Tensors = {}
        if self._read is not None:
            fields["read"] = _pack(self._read, "read", tensors)
        if self._ranks.first:
            base = self.done_before() if self._read is None else self.done_before(self._read.map)
            _pack_done(base, "base", tensors)
            fields |= {
                "job": self._job,
                "inputs": self._inputs(),
                "size": self._ranks.size,
                "map": "" if self._read is None else self._read.map,
                "finished": [_pack(read, str(index), tensors) for index, read in enumerate(self._finished)],
            }
        _files.save(self._path, "partial", tensors, fields, max_bytes=_MAX_BYTES)
        self._written = True

    def _open(self) -> None:
        plan: Any = None
        if self._ranks.first:
            for path in self._temporaries():
                path.unlink(missing_ok=True)
            self._token = os.urandom(8).hex()
            if self._resume and self._first_path.exists():
                self._load_first()
            plan = self._token, self._begun
        self._token, self._begun = self._ranks.broadcast(plan)
        if self._resume and not self._ranks.first and self._path.exists():
            self._loaded = self._load_part(self._path)

    def _load_first(self) -> None:
        path = self._first_path
        tensors, fields = _files.load_all(path, "partial", _MAX_BYTES)
        with _damaged(path):
            job, inputs = dict(fields["job"]), {name: list(files) for name, files in fields["inputs"].items()}
        check_same_job(str(path), job, self._job)
        _check_same_inputs(path, inputs, self._inputs())
        with _damaged(path):
            if type(fields["token"]) is not str or type(fields["map"]) is not str or type(fields["size"]) is not int:
                raise ValueError("token, map or size")
            self._token = fields["token"]
            self._finished = [_unpack(each, str(i), tensors) for i, each in enumerate(fields["finished"])]
            if fields["number"] != len(self._finished):
                raise ValueError("another number of finished reads")
            self._loaded = None if fields["read"] is None else _unpack(fields["read"], "read", tensors)
            self._begun = len(self._finished), fields["map"], _unpack_done("base", tensors)
        self._written = True
        if fields["size"] != self._ranks.size:
            self._merge_parts()

    def _load_part(self, path: Path) -> Read | None:
        """Return what another process has kept of the read under way, None if it is of another read or division."""
        tensors, fields = _files.load_all(path, "partial", _MAX_BYTES)
        if (fields.get("token"), fields.get("number")) != (self._token, self._begun[0]) or fields.get("read") is None:
            return None
        with _damaged(path):
            return _unpack(fields["read"], "read", tensors)

    def _merge_parts(self) -> None:
        """Take over what all processes have read, so that another number of them can divide the rest."""
        parts = [found for path in self._parts() if (found := self._load_part(path)) is not None]
        reads = ([] if self._loaded is None else [self._loaded]) + parts
        reads = [read for read in reads if read.map == reads[0].map]
        number = self.number = len(self._finished)
        self._begun = number, "", nothing_done()
        if reads:
            first, *others = reads
            for other in others:
                _check_alike(self._path, first, other)
                first.merge(other)
            self._begun = number, first.map, first.done.copy()
            self._loaded = self._read = first
        self._token = os.urandom(8).hex()
        self._write()  # before another part is
        self.number, self._read = 0, None
        for path in self._parts():
            path.unlink(missing_ok=True)


def _check_alike(path: Path, read: Read, loaded: Read) -> None:
    def kind(of: Read) -> object:
        return of.moments.dim, of.moments.has_covariance, of.moments.precision, of.sample and of.sample.dtype

    if kind(read) != kind(loaded):
        raise ValueError(f"{path} is damaged: it holds {loaded.moments!r}, expected {read.moments!r}")


def _check_same_inputs(path: Path, before: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> None:
    for name in now:
        old, new = [tuple(each) for each in before.get(name, [])], [tuple(each) for each in now[name]]
        if len(old) != len(new):
            raise ValueError(f"{path} is of another job: {name} had {len(old)} files, now it has {len(new)}")
        for one, other in zip(old, new, strict=True):
            if one != other:
                change = "has changed" if one[0] == other[0] else f"is now {other[0]}"
                raise ValueError(f"{path} is of another job: of {name}, {one[0]} {change}")


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged, start again without resume: {error!r}") from None


def _pack(read: Read, prefix: str, tensors: Tensors) -> dict[str, Any]:
    """Put the tensors of a read among `tensors` and return its fields."""
    of_moments, fields = read.moments.state()
    found: dict[str, Any] = {"moments": fields, "sample": None, "map": read.map}
    tensors.update({f"{prefix}.{name}": tensor for name, tensor in of_moments.items()})
    if read.sample is not None:
        of_sample, counts = read.sample.state()
        found["sample"] = {"dtype": read.sample.dtype, **counts}
        tensors.update({f"{prefix}.{name}": tensor for name, tensor in of_sample.items()})
    _pack_done(read.done, prefix, tensors)
    return found


def _pack_done(done: Done, prefix: str, tensors: Tensors) -> None:
    numbers = sorted(done.rows)
    tensors[f"{prefix}.files"] = np.array(numbers, np.int64)
    tensors[f"{prefix}.done"] = np.array([done.rows[number] for number in numbers], np.int64)
    tensors[f"{prefix}.whole"] = np.array(sorted(done.whole), np.int64)


def _unpack(fields: Mapping[str, Any], prefix: str, tensors: Tensors) -> Read:
    own = {name.removeprefix(f"{prefix}."): each for name, each in tensors.items() if name.startswith(f"{prefix}.")}
    for name, dtype, ndim in (("sums", np.int64, 1), ("products", np.float64, 2), ("pilot", np.float64, 1)):
        if name in own and not (own[name].dtype == dtype and own[name].ndim == ndim):
            raise ValueError(f"tensor {prefix}.{name}")
    kind = MappedMoments if fields["moments"].get("mapped") else Moments
    moments, counts, sample = kind.of_state(prefix, own, fields["moments"]), fields["sample"], None
    if counts is not None:
        sample = Sample.of_state(own, counts, moments.dim, counts["dtype"], None)
    if type(fields["map"]) is not str:
        raise ValueError("map")
    return Read(moments, sample, fields["map"], _unpack_done(prefix, tensors))


def _unpack_done(prefix: str, tensors: Tensors) -> Done:
    numbers, counts, whole = (tensors[f"{prefix}.{name}"] for name in ("files", "done", "whole"))
    for each in (numbers, counts, whole):
        if each.dtype != np.int64 or each.ndim != 1 or (each < 0).any():
            raise ValueError(f"{prefix}: rows done")
    return Done(dict(zip(numbers.tolist(), counts.tolist(), strict=True)), set(whole.tolist()))
