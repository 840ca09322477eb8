"""Reading embeddings by format: statistics of a file, against the format's own library only reading it."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet
from safetensors.numpy import load_file, save_file

from realign_fast.alignment import gather_moments
from realign_fast.benchmark import rows_of

CHECKED_BY = ("test_io_formats.py", "test_io_tar.py")
DIM = 768


def column(rows: np.ndarray) -> pa.Table:
    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), DIM)
    return pa.table({"embedding": values})


def write_arrow(path: Path, rows: np.ndarray) -> None:
    table = column(rows)
    with ipc.new_file(str(path), table.schema) as file:
        for batch in table.to_batches(max_chunksize=8192):
            file.write_batch(batch)


def read_arrow(path: Path) -> None:
    with pa.memory_map(str(path)) as file:
        for values in ipc.open_file(file).read_all().column("embedding").chunks:
            values.flatten().to_numpy().view(np.uint64).sum()


def write_pickle(path: Path, rows: np.ndarray) -> None:
    with path.open("wb") as file:
        pickle.dump([{"id": number, "embed": row} for number, row in enumerate(rows)], file, protocol=4)


def read_pickle(path: Path) -> None:
    with path.open("rb") as file:
        np.stack([entry["embed"] for entry in pickle.load(file)])


def write_tar(path: Path, rows: np.ndarray) -> None:
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            buffer = io.BytesIO()
            np.save(buffer, row)
            member = tarfile.TarInfo(f"{number:08}.npy")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)


def read_tar(path: Path) -> None:
    import webdataset

    for _ in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode():
        pass


def read_parquet(path: Path) -> None:
    for values in parquet.read_table(path).column("embedding").chunks:
        values.flatten().to_numpy()


Write, Read = Callable[[Path, np.ndarray], object], Callable[[Path], object]
WHY = {
    "pickle.load and numpy.stack": "the peer runs whatever the file says; ours checks every array, and reads the file "
    "twice, since only its rows tell how many there are and of which kind",
}
# By ending: the rows of which there are fewer because they are slow to write, how it is written, and the library.
FORMATS: dict[str, tuple[int, Write, str, Read]] = {
    ".npy": (1, np.save, "numpy.load", np.load),
    ".safetensors": (1, lambda path, rows: save_file({"embeddings": rows}, path), "safetensors load_file", load_file),
    ".arrow": (1, write_arrow, "pyarrow, mapped and added up", read_arrow),
    ".parquet": (
        2,
        lambda path, rows: parquet.write_table(column(rows), path, use_dictionary=False, compression="NONE"),
        "pyarrow read_table",
        read_parquet,
    ),
    ".pkl": (5, write_pickle, "pickle.load and numpy.stack", read_pickle),
    ".tar": (20, write_tar, "webdataset", read_tar),
}


@pytest.mark.parametrize("ending", FORMATS)
def test_reading(measure, pick, folder, ending):
    divisor, write, name, read = FORMATS[ending]
    rows = rows_of(pick(2_000, 100_000, 500_000) // divisor, DIM, "float32")
    path = folder / f"rows{ending}"
    write(path, rows)
    measure(
        f"statistics of a {ending} file",
        lambda: gather_moments(path),
        {name: lambda: read(path)},
        unit="GB/s",
        work=rows.nbytes,
        limit="read",
        dtype="float32",
        shape=rows.shape,
        why=WHY,
        rounds=pick(2, 3, 5),
    )
