"""A thousand damaged files of each format: each is read to its end or refused, and nothing else happens."""

import io
import json
import pickle
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

NUM_FILES = 1000
NUM_ROWS, DIM = 40, 6
_SPARE_BYTES = 1 << 30  # of address space, beside what the imports take; a header that claims more must not be believed

_SUFFIXES = {"npy": ".npy", "safetensors": ".safetensors", "parquet": ".parquet", "arrow": ".arrow", "pickle": ".pkl"}
# What damaged headers like to say.
_NUMBERS = [b"-1", b"0", b"1e9", b"999999999999", b"18446744073709551616", b"null", b"[]", b"{}", b'"x"', b"\xff\xff"]


def healthy(kind: str) -> list[bytes]:
    rows = np.random.default_rng(0).normal(size=(NUM_ROWS, DIM))
    if kind == "npy":
        files = []
        for values in (rows.astype("<f4"), np.asfortranarray(rows.astype(">f8")), rows.astype("<f2")):
            buffer = io.BytesIO()
            np.save(buffer, values)
            files.append(buffer.getvalue())
        return files
    if kind == "safetensors":
        from safetensors.numpy import save

        return [save({"embedding": rows.astype(np.float32), "id": np.arange(NUM_ROWS)}, {"made": "here"})]
    if kind == "pickle":
        dicts = [{"id": i, "embed": row.astype(np.float32), "text": "a" * i} for i, row in enumerate(rows)]
        lists = [{"id": str(i), "embed": row.tolist()} for i, row in enumerate(rows)]
        return [pickle.dumps(value, protocol) for value in (dicts, lists) for protocol in (0, 2, 4, 5)]
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for kind_of_list in (pa.list_(pa.float32()), pa.list_(pa.float32(), DIM), pa.large_list(pa.float64())):
        table = pa.table({"id": list(range(NUM_ROWS)), "embedding": pa.array(rows.tolist(), type=kind_of_list)})
        sink = pa.BufferOutputStream()
        if kind == "parquet":
            pq.write_table(table, sink, row_group_size=16)
        else:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=16)
        files.append(sink.getvalue().to_pybytes())
    return files


def damaged(data: bytes, rng: random.Random, files: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed)) if changed else 0
        match rng.randrange(7):
            case 0 | 1:
                if changed:
                    changed[at] ^= 1 << rng.randrange(8)
            case 2:
                if changed:
                    changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 3:
                del changed[at : at + rng.choice((1, 8, 64, len(changed)))]
            case 4:
                changed[at:at] = changed[at : at + rng.choice((1, 8, 64, 512))]
            case 5:
                changed[at : at + rng.choice((0, 1, 4, 8))] = rng.choice(_NUMBERS)
            case 6:
                other = rng.choice(files)
                start = rng.randrange(len(other))
                changed[at : at + 32] = other[start : start + 32]
    return bytes(changed)


def read_all(kind: str, folder: Path) -> None:
    """Runs in a process of its own: read every file; the name of the one at hand is on the last line of stdout."""
    import realign_fast as rf
    from realign_fast.io.formats import open_shard
    from realign_fast.io.sources import open_source

    for path in sorted(folder.iterdir()):  # once, so that imports and thread pools lie below the limit
        list(open_source(path, name="file").batches()) if path.stem == "healthy" else None
    rf.Moments(DIM)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _SPARE_BYTES, used + _SPARE_BYTES))
    outcomes = {"read": 0, "refused": 0}
    for path in sorted(folder.iterdir()):
        print(path.name, flush=True)
        try:
            open_shard(path)
            for batch in open_source(path, name="file").batches():
                assert batch.rows.values.ndim == 2
            outcomes["read"] += 1
        except (ValueError, TypeError, OSError) as error:
            if str(path) not in str(error):
                raise SystemExit(f"{path.name}: the error does not name the file: {error}") from error
            outcomes["refused"] += 1
    print(json.dumps(outcomes))


@pytest.mark.parametrize("kind", _SUFFIXES)
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    if kind in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    rng = random.Random(kind)
    files = healthy(kind)
    (tmp_path / f"healthy{_SUFFIXES[kind]}").write_bytes(files[0])
    for index in range(NUM_FILES):
        name = f"damaged_{index:04}{_SUFFIXES[kind]}"
        (tmp_path / name).write_bytes(damaged(rng.choice(files), rng, files))
    command = [sys.executable, __file__, kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, f"at {last}: {done.stderr[-2000:]}"
    outcomes = json.loads(last)
    assert sum(outcomes.values()) == NUM_FILES + 1
    assert min(outcomes.values()) > 0, outcomes


if __name__ == "__main__":
    read_all(sys.argv[1], Path(sys.argv[2]))
