"""Moments of a sliding corpus: those of its last parts, such as days or shards."""

from __future__ import annotations

import os
from collections import deque
from functools import reduce

import numpy as np

from . import _files
from .moments import Moments


class MomentsWindow:
    """The last `size` parts of a corpus that grows and forgets, and the moments of them together.

    Each part is kept, so that one that leaves is taken out without reading it again: `total` has the bits of moments
    gathered anew from what is left, its covariance those of a merge of the parts in order. No error of parts that
    have left stays behind, however many have. `save` and `load` keep the window from one day to the next.

    Parameters
    ----------
    dim
        Dimension of the rows.
    size
        Parts to keep, at least 1.
    covariance
        Whether the parts have collected it. Each then takes `dim**2` float64.

    Attributes
    ----------
    dim, size : int
    covariance : bool

    Raises
    ------
    ValueError
        If `dim` or `size` is less than 1, or the window would be larger than a file of the package may be (1 GiB).

    Examples
    --------
    >>> window = MomentsWindow.load("text.window.safetensors")
    >>> window.push(Moments.load("today.safetensors"), "2026-02-01")
    >>> window.save("text.window.safetensors")
    >>> alignment = fit_from_moments(window.total, image_moments, method="anchor_trace")
    """

    def __init__(self, dim: int, size: int, covariance: bool = False) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim, self.size, self.covariance = int(dim), int(size), bool(covariance)
        part_bytes = 8 * dim * (dim + 2 if covariance else 1)
        if size * part_bytes > _files.MAX_FILE_BYTES:
            raise ValueError(
                f"{size} parts of {part_bytes} bytes are more than the {_files.MAX_FILE_BYTES} bytes that a file may "
                "hold: keep fewer, of more rows each"
            )
        self._parts: deque[tuple[str | None, Moments]] = deque()

    def push(self, part: Moments, name: str | None = None) -> Moments | None:
        """Add a part, and return the oldest where that has to leave.

        Parameters
        ----------
        part
            Its moments, of which a copy is kept.
        name
            Of the part, such as its day: then no part of this name is taken again while it is in the window, for
            instance by a job that is run twice.

        Raises
        ------
        ValueError
            If a part of this name is in the window, or `part` has another dimension, or a covariance where the window
            has none, or none where it has; the window is as it was.
        """
        if name is not None and name in self.names:
            raise ValueError(f"part {name!r} is in the window already")
        kept = Moments(self.dim, self.covariance, part.precision).merge(part)
        left = self._parts.popleft()[1] if len(self._parts) == self.size else None
        self._parts.append((name, kept))
        return left

    @property
    def total(self) -> Moments:
        """Moments of all parts together, added up in order."""
        if not self._parts:
            return Moments(self.dim, self.covariance)
        first, *others = (part for _, part in self._parts)
        return reduce(Moments.merge, others, first.copy())

    @property
    def parts(self) -> tuple[Moments, ...]:
        """Copies of the parts, the oldest first."""
        return tuple(part.copy() for _, part in self._parts)

    @property
    def names(self) -> tuple[str | None, ...]:
        """Names of the parts, the oldest first; None for those without."""
        return tuple(name for name, _ in self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MomentsWindow):
            return NotImplemented
        mine, theirs = ((each.dim, each.size, each.covariance, each._parts) for each in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]  # a mutable value

    def __repr__(self) -> str:
        count = sum(part.count for _, part in self._parts)
        covariance = ", covariance=True" if self.covariance else ""
        return f"MomentsWindow(dim={self.dim}, size={self.size}, parts={len(self)}, count={count}{covariance})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        found = [part.state() for _, part in self._parts]
        kind, _ = Moments(self.dim, self.covariance).state()
        tensors = {
            name: np.array([part[name] for part, _ in found], like.dtype).reshape(-1, *like.shape)
            for name, like in kind.items()
        }
        parts = [{"name": name, **fields} for name, (_, fields) in zip(self.names, found, strict=True)]
        fields = {"size": self.size, "covariance": self.covariance, "parts": parts}
        _files.save(path, "window", tensors, fields, version=2)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MomentsWindow:
        """Read what `save` wrote.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it is damaged, holds something else, or comes from a newer format.
        """
        real = np.dtype(np.float64)
        more = {"pilot": (real, 2), "products": (real, 3)}
        tensors, fields = _files.load(path, "window", {"sums": (np.dtype(np.int64), 2)}, optional=more)
        size, covariance, parts = (fields.get(name) for name in ("size", "covariance", "parts"))
        names = {"sums", *more} if covariance else {"sums"}
        if type(size) is not int or type(covariance) is not bool or not isinstance(parts, list):
            raise ValueError(f"{path}: its header is damaged: {size!r}, {covariance!r}")
        if tensors.keys() != names or {len(tensor) for tensor in tensors.values()} != {len(parts)} or len(parts) > size:
            raise ValueError(f"{path}: its tensors, {len(parts)} parts and size {size} do not fit together")
        try:
            window = cls(tensors["sums"].shape[1], size, covariance)
            for i, part in enumerate(parts):
                if not isinstance(part, dict) or not isinstance(part.get("name"), str | None):
                    raise ValueError("its header is damaged")
                of_part = {name: tensor[i] for name, tensor in tensors.items()}
                window.push(Moments.of_state(f"part {i}", of_part, part), part.get("name"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return window
