"""Records of LLaVA and Bunny, JSON arrays or JSONL, and which row of the embeddings is theirs."""

from __future__ import annotations

from array import array
from itertools import islice
from typing import Any, Literal

import numpy as np

from ..io._json import JsonObjects
from ..io.sources import local_files
from ._chat import messages_of

_RECORDS_AT_ONCE = 4096
_MAX_NAMED = 5


class Records:
    """Records of JSON arrays and JSONL files by number, each read where it lies.

    The files are read once at the start: every record is decoded and looked at, and 32 bytes of it are kept.

    Parameters
    ----------
    paths
        Local files: a path, a glob or a list of such.
    embeddings
        The `realign_fast.data.EmbeddingDataset`, with an `index`, that has an embedding of each record's id.
    id_key
        The key of the ids, text or integers, which are compared as the embeddings have them.
    on_bad_records
        What becomes of records without an embedding, without exactly one `<image>`, or without messages or an answer:
        "raise", or "skip", which leaves them out.

    Attributes
    ----------
    rows : ndarray
        `(n,)` int64, the number of each record's embedding; without embeddings, that of the record among all.
    skipped : dict
        For each reason why records were left out `{"count": int, "first": [place, ...]}`, with at most 5 places.

    Raises
    ------
    OSError, ValueError
        If a file cannot be read or is damaged, an element is no object, a record is bad under "raise", or none is left.
    """

    def __init__(
        self,
        paths: Any,
        *,
        embeddings: Any = None,
        id_key: str = "id",
        on_bad_records: Literal["raise", "skip"] = "raise",
    ) -> None:
        if on_bad_records not in ("raise", "skip"):
            raise ValueError(f"on_bad_records must be 'raise' or 'skip', got {on_bad_records!r}")
        self.embeddings, self.id_key = embeddings, id_key
        self.skipped: dict[str, dict[str, Any]] = {}
        self._objects = JsonObjects(local_files(paths))
        kept, seen = array("q"), 0
        looked_at = map(self._look, self._objects.scan())
        while some := list(islice(looked_at, _RECORDS_AT_ONCE)):
            rows = range(seen, seen + len(some))
            if embeddings is not None:
                rows = embeddings.locate(["" if problem else name for name, problem in some])
            for number, (row, (name, problem)) in enumerate(zip(rows, some, strict=True), seen):
                if row >= 0 and not problem:
                    kept.extend((number, row))
                    continue
                problem = problem or "no embedding of its id"
                place = f"{self._objects.place(number)} (id {name!r})"
                if on_bad_records == "raise":
                    raise ValueError(f"{place}: {problem}")
                entry = self.skipped.setdefault(problem, {"count": 0, "first": []})
                entry["count"] += 1
                entry["first"] = [*entry["first"], place][:_MAX_NAMED]
            seen += len(some)
        if not kept:
            raise ValueError(f"{paths} hold no record to use; left out: {self.skipped}")
        self._numbers, self.rows = np.array(kept, np.int64).reshape(-1, 2).T.copy()

    def _look(self, record: dict[str, Any]) -> tuple[str, str]:
        """Return the id as text, and what is wrong with the record, if anything."""
        name = record.get(self.id_key)
        try:
            messages_of(record)
            str(name).encode()
        except ValueError as error:
            return str(name), str(error)
        return str(name), "" if self.embeddings is None or isinstance(name, str | int) else "no id"

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, number: int) -> str:
        """Return where a record lies: file, number in it, and byte."""
        return self._objects.place(int(self._numbers[number]))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Read and decode a record; ValueError if its file has changed."""
        return self._objects[int(self._numbers[number])]
