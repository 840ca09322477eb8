import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pyarrow import parquet
from safetensors.numpy import save_file

# Of minutes: they begin first, so that no process is left with one of them when the others are done.
_LONG_FILES = ("test_readme.py", "test_ranks.py", "test_report.py", "test_recipes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG_FILES)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real embeddings that lies beside a checkout, where there is one."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real embeddings at {folder}")
    return folder


def _table(values: NDArray[Any], ids: list[Any] | None) -> pa.Table:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.table({"embedding": lists} if ids is None else {"id": ids, "embedding": lists})


def _write_shard(path: Path, values: NDArray[Any], ids: list[Any] | None = None) -> Path:
    """Write a file of embeddings in the format of its suffix, ids where the format takes them."""
    match path.suffix:
        case ".npy":
            np.save(path, values)
        case ".safetensors":
            save_file({"embedding": np.ascontiguousarray(values)}, path)
        case ".parquet":
            parquet.write_table(_table(values, ids), path)
        case ".arrow":
            table = _table(values, ids)
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
        case ".pkl":
            ids = list(range(len(values))) if ids is None else ids
            path.write_bytes(pickle.dumps([{"id": i, "embed": row.copy()} for i, row in zip(ids, values, strict=True)]))
        case ".tar":
            with tarfile.open(path, "w") as tar:
                for i, row in enumerate(values):
                    data = io.BytesIO()
                    np.save(data, row)
                    member = tarfile.TarInfo(f"{f'{i:06}' if ids is None else ids[i]}.npy")
                    member.size = data.tell()
                    data.seek(0)
                    tar.addfile(member, data)
        case suffix:
            raise ValueError(suffix)
    return path


@pytest.fixture(scope="session")
def write_shard() -> Callable[..., Path]:
    """Return the function `write_shard(path, values, ids=None)`."""
    return _write_shard
