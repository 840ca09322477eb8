"""Alignments of several domains, each row mapped by its own in one pass over the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._rows import is_tensor
from ._transform import Steps, transform_by
from .alignment import Alignment, Side
from .methods import ParametersTable


class AlignmentBank(Mapping[str, Alignment]):
    """A mapping from names of domains to their alignments, of one dimension.

    Parameters
    ----------
    alignments
        By name; a domain's number is its place in them.

    Raises
    ------
    ValueError
        If there are none, their dimensions differ, or a map has a matrix or noise.
    """

    def __init__(self, alignments: Mapping[str, Alignment]) -> None:
        if not alignments:
            raise ValueError("alignments must hold at least one")
        self._alignments = dict(alignments)
        first, self.dim = next((name, alignment.dim) for name, alignment in self._alignments.items())
        for name, alignment in self._alignments.items():
            if alignment.parameters.affine is not None or alignment.parameters.noise_std:
                raise ValueError(
                    f"alignments must be maps with a scale and no noise: {name!r} was fitted by {alignment.method!r}"
                )
            if alignment.dim != self.dim:
                raise ValueError(
                    f"alignments must have one dimension: {first!r} has {self.dim}, {name!r} has {alignment.dim}"
                )
        self._tables: dict[Side, ParametersTable] = {}
        self._numbers = {name: number for number, name in enumerate(self._alignments)}

    def __getitem__(self, name: str) -> Alignment:
        return self._alignments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._alignments)

    def __len__(self) -> int:
        return len(self._alignments)

    def __repr__(self) -> str:
        return f"AlignmentBank({list(self)}, dim={self.dim})"

    def transform(
        self,
        x: Any,
        domain: Any,
        out: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
        num_threads: int | None = None,
        side: Side = "source",
        on_bad_rows: Literal["raise", "zero"] = "raise",
    ) -> Any:
        """Map each row by the alignment of its domain; all else is as in `Alignment.transform`.

        Parameters
        ----------
        x
            `(..., dim)` array or tensor.
        domain
            Name or number of a domain for all rows, or one for each row: names or integers of shape `(...)`.

        Raises
        ------
        TypeError, ValueError
            If a domain is unknown, or `domain` has another shape than the rows; and as `Alignment.transform`.
        """
        if isinstance(domain, str | int | np.integer):
            alignment = list(self.values())[self._number(domain)]
            return alignment.transform(
                x, out, dtype, backend=backend, num_threads=num_threads, side=side, on_bad_rows=on_bad_rows
            )
        return transform_by(
            Steps(None, self._table(side), self._numbers_of(domain, tuple(x.shape[:-1]))),
            x,
            out,
            dtype,
            backend=backend,
            num_threads=num_threads,
            on_bad_rows=on_bad_rows,
        )

    def _table(self, side: Side) -> ParametersTable:
        if side not in self._tables:
            self._tables[side] = ParametersTable(alignment.parameters_of(side) for alignment in self.values())
        return self._tables[side]

    def _number(self, domain: str | int | np.integer[Any]) -> int:
        number = self._numbers.get(domain, -1) if isinstance(domain, str) else int(domain)
        if not 0 <= number < len(self):
            raise ValueError(f"domain must be one of {list(self)} or their number below {len(self)}, got {domain!r}")
        return number

    def _numbers_of(self, domain: Any, shape: tuple[int, ...]) -> NDArray[np.int64]:
        values = domain.cpu().numpy() if is_tensor(domain) else np.asarray(domain)
        if values.shape != shape:
            raise ValueError(f"domain must have one entry a row, shape {shape}, got {values.shape}")
        if values.dtype.kind in "OU":
            values = np.array([self._number(name) for name in values.ravel().tolist()], np.int64)
        elif values.dtype.kind not in "iu":
            raise TypeError(f"domain must be names or integers, got {values.dtype}")
        values = np.ascontiguousarray(values.ravel(), np.int64)
        unknown = np.flatnonzero((values < 0) | (values >= len(self)))
        if unknown.size:
            raise ValueError(f"domain must lie in [0, {len(self)}), got {values[unknown[0]]} for row {unknown[0]}")
        return values
