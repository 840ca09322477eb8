"""Pickles of a list of dicts, one a row, read without running anything.

Three fences: `_C.scan_pickle` walks the bytes and refuses what could exhaust memory or the stack; the unpickler knows
only the few names below; and each of those is a function of ours that checks what it is given, so that no code of
NumPy's sees a claimed shape or dtype before we have compared it with the bytes that are there.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._dtypes import Rows
from .._native import _C
from .._rows import dtype_name
from ._raw import Blocks, Chunk, check_shape

_COLUMNS = ("embedding", "embed")
# Old protocols hold the bytes of an array as text, which is encoded and then copied.
_MAX_COPIES = 4


class PickleShard:
    """One `.pkl` file: a list of dicts, of which `column` (by default "embed" or "embedding") is the embedding.

    An embedding is an array of shape `(dim,)` or `(1, dim)`, or a list of floats. A pickle can only be read as a whole,
    so its number of rows, dimension and dtype are not known before.
    """

    num_rows = None
    dim = 0
    dtype = ""
    decoded = True

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        self._column = column
        with path.open("rb"):
            pass  # a missing or unreadable file is an error now

    def load(self) -> LoadedPickle:
        """Read the file."""
        return LoadedPickle(self.path, self._column)

    def chunks(self, blocks: Blocks, *, columns: bool = False) -> Generator[Chunk, None, None]:
        """Read the rows, with their dicts if `columns`."""
        yield from self.load().chunks(blocks, columns=columns)


class LoadedPickle:
    """A pickle in memory: its dicts, and which of their keys is the embedding (empty where there are no dicts)."""

    decoded = True

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        self.dicts = load_pickle(path)
        self.num_rows = len(self.dicts)
        self.column, self.dim, self.dtype = "", 0, ""
        if self.dicts:
            self.column = self._choose(column)
            first = self._embedding(0)
            self.dim, self.dtype = len(first), dtype_name(first.dtype)
            check_shape(path, self.num_rows, self.dim)

    def chunks(self, blocks: Blocks, *, columns: bool = False) -> Generator[Chunk, None, None]:
        """Copy out the rows, with their dicts if `columns`."""
        if not self.dicts:
            return
        dtype = np.dtype(self.dtype)
        step = blocks.num_rows(self.dim * dtype.itemsize)
        for start in range(0, self.num_rows, step):
            part = self.dicts[start : start + step]
            values = blocks.take(len(part), self.dim, dtype)
            for i in range(len(part)):
                row = self._embedding(start + i)
                if len(row) != self.dim or row.dtype.name != self.dtype:
                    raise ValueError(
                        f"{self.path}: row {start + i} has dimension {len(row)} and dtype {row.dtype}, "
                        f"expected {self.dim} and {self.dtype} as in row 0"
                    )
                values[i] = row
            yield Chunk(Rows(values, self.dtype), start, part if columns else None)

    def _choose(self, column: str | None) -> str:
        for name in _COLUMNS if column is None else (column,):
            if name in self.dicts[0]:
                return name
        expected = " or ".join(map(repr, _COLUMNS if column is None else (column,)))
        raise ValueError(f"{self.path}: row 0 has no {expected}; its keys are {list(self.dicts[0])}")

    def _embedding(self, row: int) -> NDArray[Any]:
        try:
            value = self.dicts[row][self.column]
        except KeyError:
            keys = list(self.dicts[row])
            raise ValueError(f"{self.path}: row {row} has no {self.column!r}; its keys are {keys}") from None
        if type(value) is list:
            inner = value[0] if len(value) == 1 and type(value[0]) is list else value
            if all(isinstance(element, float | int | np.floating) for element in inner):
                value = np.asarray(inner)
        if isinstance(value, np.ndarray):
            if value.dtype.kind != "f":
                try:
                    dtype_name(value.dtype, name=f"row {row}")
                except TypeError as error:
                    raise ValueError(f"{self.path}: {error}") from None
            if value.size and value.shape in ((value.size,), (1, value.size)):
                return value.reshape(-1)
        got = f"shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{self.path}: row {row} must be an array of shape (dim,) or a list of floats, got {got}")


def load_pickle(path: Path) -> list[dict[str, Any]]:
    """Return the dicts of a file; ValueError, naming it, where it holds anything else."""
    data = path.read_bytes()
    try:
        _C.scan_pickle(data)
        # Python 2 wrote array bytes as str; latin1 gives them back unchanged.
        value = _Unpickler(data).load()
    except (MemoryError, RecursionError):
        raise ValueError(f"{path}: refused: it needs more memory than its size explains") from None
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise ValueError(f"{path}: refused or damaged: {error}") from None
    if type(value) is not list:
        raise ValueError(f"{path}: expected a list of dicts, got {type(value).__name__}")
    for index, item in enumerate(value):
        if type(item) is not dict:
            raise ValueError(f"{path}: item {index} must be a dict, got {type(item).__name__}")
    return value


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._admitted = _admitted(_Budget(_MAX_COPIES * len(data)))

    def find_class(self, module: str, name: str) -> Any:
        found = self._admitted.get((module.replace("numpy._core", "numpy.core"), name))
        if found is not None:
            return found
        if module.split(".")[0] == "torch":
            raise pickle.UnpicklingError("it holds a torch tensor: pickle tensor.cpu().float().numpy() instead")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is neither a plain value nor a NumPy array")


class _Budget:
    """How many bytes arrays and scalars may still copy: a pickle can name the same bytes any number of times."""

    __slots__ = ("_left",)

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes

    def spend(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise pickle.UnpicklingError("its arrays need more memory than its size explains")


class _Name:
    """What a pickle gets for a name: it can be called and nothing else."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a name cannot have a state")


class _Dtype:
    """A dtype as pickles describe it: kind and size, then the byte order as state."""

    __slots__ = ("_order", "_text")

    def __init__(self, text: object, align: object = False, copy: object = True) -> None:
        if not isinstance(text, str) or not re.fullmatch(r"[biuf][1248]|[US][1-9]\d{0,5}", text):
            raise pickle.UnpicklingError(f"dtype {_short(text)} is not that of plain numbers or strings")
        self._text = text
        self._order = "="

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("the state of a dtype is damaged")
        self._order = state[1]

    def __reduce__(self) -> Any:
        raise TypeError("a dtype is no plain value")

    def resolve(self) -> np.dtype[Any]:
        return np.dtype(self._order.replace("|", "=") + self._text)


class _Array(np.ndarray[Any, Any]):
    """An array that is filled by its pickled state, once that has been checked."""

    __slots__ = ("budget",)
    budget: _Budget

    def __setstate__(self, state: Any, /) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise pickle.UnpicklingError("the state of an array is damaged")
        _, shape, dtype, fortran, data = state
        checked, data = _checked(self.budget, data, dtype, shape)
        super().__setstate__((1, shape, checked, bool(fortran), bytes(data)))  # type: ignore[arg-type]

    def __reduce__(self) -> Any:
        return self.view(np.ndarray).__reduce__()


def _checked(budget: _Budget, data: Any, dtype: object, shape: object) -> tuple[np.dtype[Any], Any]:
    """Return the dtype, and the bytes, of an array that is what it claims to be."""
    if isinstance(data, str):
        budget.spend(len(data))
        data = data.encode("latin1")
    if type(dtype) is not _Dtype or type(data) not in (bytes, bytearray):
        raise pickle.UnpicklingError("an array holds objects or names no dtype")
    if type(shape) is not tuple or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError(f"an array has the shape {_short(shape)}")
    resolved = dtype.resolve()
    expected = math.prod(shape) * resolved.itemsize
    if expected != len(data):
        raise pickle.UnpicklingError(f"an array of shape {shape} needs {expected} bytes, got {len(data)}")
    if any(n > len(data) for n in shape):
        raise pickle.UnpicklingError(f"an array has the shape {shape}")
    budget.spend(len(data))
    return resolved, data


def _short(value: object) -> str:
    """Return what `value` is: the text of a container that holds others many times over would not end."""
    return repr(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"


def _reconstruct(budget: _Budget, kind: object, shape: object, code: object) -> NDArray[Any]:
    array = _Array((0,), np.uint8)
    array.budget = budget
    return array


def _from_buffer(budget: _Budget, data: Any, dtype: object, shape: Any, order: object) -> NDArray[Any]:
    resolved, data = _checked(budget, data, dtype, shape)
    return np.frombuffer(data, resolved).reshape(shape, order="F" if order == "F" else "C")


def _scalar(budget: _Budget, dtype: object, data: Any) -> Any:
    resolved, data = _checked(budget, data, dtype, ())
    return np.frombuffer(data, resolved)[0]


def _encode(budget: _Budget, text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes are not stored as latin1")
    budget.spend(len(text))
    return text.encode("latin1")


def _no_call(*_: object) -> Any:
    raise pickle.UnpicklingError("an array is made by calling its type")


def _admitted(budget: _Budget) -> dict[tuple[str, str], _Name]:
    return {
        ("numpy.core.multiarray", "_reconstruct"): _Name(partial(_reconstruct, budget)),
        ("numpy.core.multiarray", "scalar"): _Name(partial(_scalar, budget)),
        ("numpy.core.numeric", "_frombuffer"): _Name(partial(_from_buffer, budget)),
        ("numpy", "ndarray"): _Name(_no_call),
        ("numpy", "dtype"): _Name(_Dtype),
        ("_codecs", "encode"): _Name(partial(_encode, budget)),
    }
