"""Errors that carry where a row lies."""

from __future__ import annotations


class BadRowsError(ValueError):
    """Rows that hold NaN or infinities, or have norm zero, met under `on_bad_rows="raise"`.

    Attributes
    ----------
    origin : str
        The file, or the name of the array.
    row : int
        Index of the first bad row within `origin`.
    num_zero, num_nonfinite : int
        How many there are of each kind in the rows looked at.
    """

    def __init__(self, origin: str, row: int, num_zero: int, num_nonfinite: int) -> None:
        self.origin, self.row, self.num_zero, self.num_nonfinite = origin, row, num_zero, num_nonfinite
        super().__init__(origin, row, num_zero, num_nonfinite)

    def __str__(self) -> str:
        kinds = [
            f"{count} {kind}"
            for count, kind in ((self.num_nonfinite, "with NaN or infinity"), (self.num_zero, "of norm zero"))
            if count
        ]
        return (
            f"{self.origin}: row {self.row} is bad (among the rows read with it: {', '.join(kinds)}); "
            "expected finite rows of non-zero norm, or on_bad_rows='zero' or 'skip'"
        )

    def moved(self, origin: str, start: int) -> BadRowsError:
        """Return the same error for rows that begin at row `start` of `origin`."""
        return BadRowsError(origin, start + self.row, self.num_zero, self.num_nonfinite)


def raise_if_bad(bad: tuple[int, int, int], on_bad_rows: str, name: str) -> None:
    """Raise BadRowsError where a kernel met bad rows, `(num_zero, num_nonfinite, first)`, and the policy is "raise"."""
    num_zero, num_nonfinite, first = bad
    if first >= 0 and on_bad_rows == "raise":
        raise BadRowsError(name, first, num_zero, num_nonfinite)
